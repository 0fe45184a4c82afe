"""Words of Megatron-LM and its kin, with any values, and launch scripts of any text: one sentence for each mistake, never a traceback."""

import random
from pathlib import Path

import pytest
from support import TINY

from megazero.base import UserError
from megazero.plan import Plan, checks, describe
from megazero.settings import as_file, from_command_line, in_our_words, launch_of

WORDS = (Path(__file__).parents[1] / "golden" / "megatron_words.txt").read_text().split()
VALUES = ["", "1", "0", "-1", "8", "1e400", "x", "$X", "auto", "16 16 300", "0:16 2.4B:320", "127,0", "(1,2)", "3.5", "1_000", "nan", "é", "a=b", "--", "-x",
          "/proc", "/dev/null", "[]", "0.5 a 0.5 b", "adamw", "alibi", "rope", "fp32"]
PIECES = ["A=", "A+=", "(", ")", '"', "'", "\\", "\n", "$A", "${A}", "${A[@]}", "${A:-x}", "$", "#", "torchrun ", "pretrain_gpt.py ", "--lr 1 ", "|", ";", " ", "$A$A", "eval ",
          "bash -c ", "$(", "`", "export ", "é", "if [ 1 ]; then\n", "fi\n", "else\n", "if [ $A = x ]; then\n",
          "case $A in\n", "x) ", ";;", "esac\n", "f() {", "}\n", "f $A\n", "for A in x y; do\n", "done\n", "cat <<E > x\n", "E\n", "${A%x*}", "${A//x/y}", "${A[1]}", "&& ", "[[ $A == x* ]] ", "$1"]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(1, 30))])
def test_any_words_are_understood_or_refused(seed: int) -> None:
    draw, planned = random.Random(seed), 0
    for _ in range(150):
        argv = TINY.split() + ["--check"] * draw.randint(0, 1)
        for word in draw.sample(WORDS, draw.randint(1, 4)):
            argv += [f"--{word}", *(draw.choice(VALUES).split() if draw.random() < 0.6 else [])]
        in_our_words(argv).notes()
        try:
            c = from_command_line(argv)
        except UserError as error:
            assert all(s.endswith(".") and "\n" not in s for s in error.sentences)
            continue
        if not checks(c, 1):
            planned += bool(describe(Plan.of(c, 1, 101)))
    assert planned > 5


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(1, 30))])
def test_any_script_is_read_or_refused(seed: int) -> None:
    draw, found = random.Random(seed), 0
    for _ in range(200):
        text = "".join(draw.choice(PIECES) for _ in range(draw.randint(1, 60)))
        try:
            launch = launch_of(text + "\npretrain_gpt.py --lr 1 $A\n" * draw.randint(0, 1))
            as_file(launch.words, files=launch.files)
            found += 1
        except (ValueError, UserError):
            continue
    assert found > 10
    with pytest.raises(ValueError, match="more than 65,536 letters"):
        launch_of("A=x\n" + "A=$A$A\n" * 100 + "pretrain_gpt.py $A")
