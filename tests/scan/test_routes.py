"""Routes: their orders, their invariants, their cache, and their errors."""

import pickle
from dataclasses import dataclass

import pytest
import torch
from cases import PATHS
from hypothesis import given, settings
from hypothesis import strategies as st

from vision_ssm.scan import (
    ATROUS_SCAN,
    COLUMNS,
    CROSS_SCAN,
    ROWS,
    AntiDiagonal,
    Diagonal,
    Reversed,
    Routes,
    Rows,
    Shifted,
    SkipSampled,
    Snake,
    Transposed,
    Windowed,
    build_routes,
)

FULL = [
    ROWS,
    COLUMNS,
    Reversed(ROWS),
    Reversed(COLUMNS),
    Snake(),
    Transposed(Snake()),
    Diagonal(),
    AntiDiagonal(),
    Windowed(2),
    Windowed(3),
    Transposed(Windowed(7)),
]


@pytest.mark.parametrize(
    ("path", "order"),
    [
        (ROWS, [0, 1, 2, 3, 4, 5]),
        (COLUMNS, [0, 3, 1, 4, 2, 5]),
        (Reversed(COLUMNS), [5, 2, 4, 1, 3, 0]),
        (Snake(), [0, 1, 2, 5, 4, 3]),
        (Diagonal(), [2, 1, 5, 0, 4, 3]),
        (AntiDiagonal(), [0, 1, 3, 2, 4, 5]),
        (Windowed(2), [0, 1, 3, 4, 2, 5]),
        (SkipSampled(0, 1), [1, -1]),
        (SkipSampled(1, 0), [3, 5]),
    ],
    ids=str,
)
def test_order_on_a_2x3_map(path, order):
    assert path.tokens(2, 3).tolist() == order


def test_atrous_scan_equals_the_published_example():
    # EfficientVMamba's groups on a 5x6 map, pixels numbered from 1, 0 for padding
    assert [(path.tokens(5, 6) + 1).tolist() for path in ATROUS_SCAN] == [
        [1, 3, 5, 13, 15, 17, 25, 27, 29],
        [7, 19, 0, 9, 21, 0, 11, 23, 0],
        [2, 4, 6, 14, 16, 18, 26, 28, 30],
        [8, 20, 0, 10, 22, 0, 12, 24, 0],
    ]


@settings(deadline=None)
@given(height=st.integers(1, 12), width=st.integers(1, 12), path=st.sampled_from(FULL))
def test_full_paths_visit_every_token_once(height, width, path):
    assert path.tokens(height, width).sort().values.tolist() == list(range(height * width))
    assert path.complete


def test_no_path_inherits_that_it_is_complete():
    @dataclass(frozen=True)
    class EveryOther(Rows):
        def tokens(self, height, width, device=None):
            return super().tokens(height, width, device)[::2]

    assert not EveryOther().complete
    assert not Reversed(EveryOther()).complete


@pytest.mark.parametrize(
    ("paths", "complete"),
    [
        (CROSS_SCAN, True),
        (ATROUS_SCAN, False),
        ((ROWS, SkipSampled(step=1)), True),
        ((Shifted(ROWS), ROWS), False),
        ((Windowed(2), Snake()), True),
    ],
    ids=["cross", "atrous", "each one sampled", "shifted", "windows"],
)
def test_routes_know_whether_they_visit_all_tokens(paths, complete):
    routes = build_routes(paths, 3, 4)
    assert routes.complete == routes.to("meta").complete == complete


@settings(deadline=None)
@given(height=st.integers(1, 9), width=st.integers(1, 9), step=st.integers(1, 4))
def test_skip_sampled_grids_share_out_the_map(height, width, step):
    paths = [SkipSampled(row, column, step) for row in range(step) for column in range(step)]
    routes = build_routes(paths, height, width)
    assert routes.read[routes.read >= 0].sort().values.tolist() == list(range(height * width))


@settings(deadline=None)
@given(height=st.integers(1, 9), width=st.integers(1, 9))
def test_oblique_paths_follow_their_lines(height, width):
    tokens = Diagonal().tokens(height, width)
    offset = tokens % width - tokens // width
    assert torch.equal(offset, offset.sort(descending=True).values)
    tokens = AntiDiagonal().tokens(height, width)
    total = tokens % width + tokens // width
    assert torch.equal(total, total.sort().values)


def test_snake_never_jumps():
    tokens = Snake().tokens(5, 4)
    row, column = tokens // 4, tokens % 4
    assert ((row.diff().abs() + column.diff().abs()) == 1).all()


def test_shifted_writes_one_step_later():
    routes = build_routes([Shifted(Reversed(ROWS))], 1, 4)
    assert routes.read.tolist() == [[3, 2, 1, 0]]
    assert routes.write.tolist() == [[2, 1, 0, -1]]


@pytest.mark.parametrize("name", PATHS)
def test_paths_are_values(name):
    copy = pickle.loads(pickle.dumps(PATHS[name]))
    assert copy == PATHS[name]
    assert build_routes(copy, 4, 5) is build_routes(PATHS[name], 4, 5)


def test_cache_holds_no_inference_tensors():
    with torch.inference_mode():
        routes = build_routes(CROSS_SCAN, 3, 31)
    assert build_routes(CROSS_SCAN, 3, 31) is routes
    assert not routes.read.is_inference()


@pytest.mark.parametrize(
    ("read", "write", "error", "message"),
    [
        ([[0, 1], [1, 6]], None, ValueError, r"read\[1, 1\] is 6; allowed are 0\.\.5, and -1"),
        ([[0, -2]], None, ValueError, r"read\[0, 1\] is -2"),
        ([[0, 1, 0]], None, ValueError, r"read\[0\] names token 0 twice"),
        ([[0, 1]], [[2, 2]], ValueError, r"write\[0\] names token 2 twice"),
        ([[0, 1]], [[2, 7]], ValueError, r"write\[0, 1\] is 7"),
        ([[0, 1]], [[2]], ValueError, "same shape"),
        ([0, 1], None, ValueError, r"read must have shape \(routes, steps\), got \(2,\)"),
        ([[]], None, ValueError, "at least one route and one step"),
        ([[0.0, 1.0]], None, TypeError, "read must be a signed integer tensor, got torch.float32"),
    ],
)
def test_bad_indices(read, write, error, message):
    read = torch.tensor(read)
    read = read.long() if read.numel() == 0 else read
    with pytest.raises(error, match=message):
        Routes(read, None if write is None else torch.tensor(write), tokens=6)


def test_padding_may_repeat():
    assert Routes(torch.tensor([[-1, 0, -1]]), tokens=1).read.tolist() == [[-1, 0, -1]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Windowed(0), "size must be at least 1, got 0"),
        (lambda: SkipSampled(2, 0), r"row must lie in 0\.\.1 \(step - 1\), got 2"),
        (lambda: SkipSampled(0, 0, 0), "step must be at least 1, got 0"),
        (lambda: build_routes([], 2, 2), "at least one path"),
        (lambda: build_routes([ROWS], 0, 2), "height and width must be at least 1, got 0 and 2"),
        (lambda: build_routes([ROWS, SkipSampled()], 4, 4), r"same number of steps, got \[16, 4\] on a 4x4 map"),
    ],
    ids=["window", "offset", "step", "no paths", "empty map", "lengths"],
)
def test_bad_paths(make, message):
    with pytest.raises(ValueError, match=message):
        make()
