"""Trains a GPT-style language model: python pretrain_gpt.py --help"""

from megazero.config import from_command_line
from megazero.train import launch

if __name__ == "__main__":
    launch(from_command_line)
