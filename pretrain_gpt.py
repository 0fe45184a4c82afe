"""Trains a GPT-style language model: python pretrain_gpt.py --help"""

from megazero.command_line import run
from megazero.config import from_command_line
from megazero.train import main

if __name__ == "__main__":
    run(lambda: main(from_command_line()))
