"""What the knobs of lesson 02 show: the product, by whatever cut, on any number of ranks, and what was sent."""

import subprocess
import sys

import pytest

from pardist_lib.lessons.lesson02 import shown


@pytest.mark.parametrize("n, grid", [(1, (1, 1)), (3, (1, 3)), (4, (2, 2)), (6, (2, 3)), (8, (2, 4))])
def test_the_grid_nearest_to_a_square(n, grid):
    assert shown.sides(n) == grid


def test_every_row_has_an_owner():
    assert shown.owners(5, 3).tolist() == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("cut", ["rows", "columns", "inner", "summa"])
@pytest.mark.parametrize("n", [1, 3, 4])
def test_the_knobs_show_the_product_of_one_process(ranks_of, cut, n):
    seen = shown.watch(ranks_of(4), cut, n, rows=3, inner=2, columns=5).alt  # fewer rows and indices than ranks
    assert "the A of one process" in seen and "not the A" not in seen
    assert ("nothing is sent" in seen) == (n == 1)
    assert ("all_reduce" in seen) == (cut == "inner" and n > 1)


@pytest.mark.parametrize("lesson", ["01", "02"])
def test_what_ranks_import_draws_nothing(lesson):
    code = f"import sys, pardist_lib.lessons.lesson{lesson}.shown; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
