"""Trains a GPT-style language model: python pretrain_gpt.py --help"""

from megazero.run import launch
from megazero.settings import from_command_line

if __name__ == "__main__":
    launch(from_command_line)
