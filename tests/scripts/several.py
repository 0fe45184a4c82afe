"""Runs scripts one after another in one process, to import libraries once: after each `--next` a script and its words."""

import gc
import runpy
import sys

if __name__ == "__main__":
    words = sys.argv[1:]
    starts = [i for i, word in enumerate(words) if word == "--next"]
    for start, stop in zip(starts, [*starts[1:], len(words)], strict=True):
        sys.argv = words[start + 1:stop]
        runpy.run_path(sys.argv[0], run_name="__main__")
        gc.collect()                                            # transformers keeps a weak reference to the last run's configuration
        if "accelerate.state" in sys.modules:                   # and accelerate one state of the process
            state = sys.modules["accelerate.state"]
            state.AcceleratorState._reset_state(reset_partial_state=True)
            state.GradientState._reset_state()
        sys.modules.pop("diffusers.training_utils", None)       # which asks for the stage when it is imported
