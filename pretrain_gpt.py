"""Trains a GPT-style language model: python pretrain_gpt.py --help"""

from megazero.run import launch
from megazero.settings import from_command_line, in_our_words

if __name__ == "__main__":
    launch(from_command_line, told=lambda: in_our_words().notes())
