"""Routes: their orders, their invariants, their cache, and their errors."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
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
    ScanPath,
    Shifted,
    SkipSampled,
    Snake,
    Transposed,
    Windowed,
    build_routes,
    route_scan,
)
from vision_ssm.scan.routes import _Cache

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


class Every(ScanPath):
    """A class as users write them, no dataclass: every ``step``-th token."""

    def __init__(self, step):
        self.step = step

    def tokens(self, height, width, device=None):
        return torch.arange(0, height * width, self.step, device=device)


class FromTable(Every):
    def tokens(self, height, width, device=None):
        return torch.as_tensor(self.step, device=device)


@dataclass(frozen=True)
class Started(Every):
    """Its field is not all it has."""

    start: int = field(default=0, compare=False)

    def tokens(self, height, width, device=None):
        return torch.arange(self.start, height * width, device=device)


class Wider(Windowed):
    """Inherits a dataclass's comparison, which sees the size alone."""

    def __init__(self, size, extra):
        super().__init__(size)
        self.extra = extra

    def tokens(self, height, width, device=None):
        return torch.arange(self.extra, device=device)


class Slotted(ScanPath):
    __slots__ = ("count",)

    def __init__(self, count):
        object.__setattr__(self, "count", count)

    def tokens(self, height, width, device=None):
        return torch.arange(self.count, device=device)


def read(path):
    return build_routes((path,), 2, 3).read[0].tolist()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Every(1), Every(2)),
        (Started(0), Started(1)),
        (Wider(2, 3), Wider(2, 4)),
        (Slotted(3), Slotted(4)),
        (Reversed(Every(2)), Reversed(Every(3))),
        (FromTable([0, 1]), FromTable([1, 0])),
        (FromTable((0, 1)), FromTable((1, 0))),
    ],
    ids=repr,
)
def test_a_class_of_the_users_own_is_a_value_by_all_its_attributes(one, other):
    assert one != other
    assert read(one) != read(other)
    copy = pickle.loads(pickle.dumps(one))
    assert copy == one
    assert read(copy) == read(one)
    if not isinstance(one, FromTable) or isinstance(one.step, tuple):
        assert hash(copy) == hash(one)
        assert build_routes((copy,), 2, 3) is build_routes((one,), 2, 3)


def test_attributes_that_change_are_never_cached():
    path = FromTable([0, 1])
    assert read(path) == [0, 1]
    path.step[0] = 5
    assert read(path) == [5, 1]
    path.step = torch.tensor([3, 4])
    assert read(path) == [3, 4]
    path.step[0] = 0
    assert read(path) == [0, 4]
    path = Every(2)
    assert read(path) == [0, 2, 4]
    path.step = 3
    assert read(path) == [0, 3]
    with pytest.raises(TypeError, match="unhashable path: its step is of type list"):
        hash(Every([2]))


def test_equal_numbers_of_other_types_are_other_routes():
    assert read(Every(1)) == [0, 1, 2, 3, 4, 5]
    assert Every(1.5) != Every(1) != Every(True)
    with pytest.raises(
        TypeError, match=r"tokens of .* must be an integer tensor of one dimension, got \(6,\) torch.float32"
    ):
        build_routes((Every(1.0),), 2, 3)


def test_a_class_defined_again_is_another():
    def define(shift):
        class Mine(ScanPath):
            def tokens(self, height, width, device=None):
                return torch.arange(height * width, device=device).roll(shift)

        return Mine()

    assert read(define(0)) != read(define(1))


def test_a_path_of_the_users_own_compiles():
    def scan(x):
        y = route_scan(x, x[:, :, None, :2], -torch.ones(1, 4, 1), build_routes((Every(2),), 2, 3), delta=x[:, :, None])
        return y.sum()

    x = torch.rand(1, 6, 4)
    torch.testing.assert_close(torch.compile(scan, fullgraph=True, backend="aot_eager")(x), scan(x))


def test_the_cache_is_bounded_by_bytes(monkeypatch):
    cache = _Cache(64 * 2**20)
    monkeypatch.setattr("vision_ssm.scan.routes._cache", cache)
    size = 4 * 4 * 70_000
    first = build_routes(CROSS_SCAN, 1, 70_000)
    for n in range(1, 100):
        build_routes(CROSS_SCAN, 1, 70_000 + n)
        assert build_routes(CROSS_SCAN, 1, 70_000) is first  # used all the time
        assert cache.held <= cache.limit
    assert cache.held > cache.limit - 2 * size
    cache.limit = size  # too small for what follows
    assert build_routes(CROSS_SCAN, 1, 70_100) is not build_routes(CROSS_SCAN, 1, 70_100)


def test_threads_share_the_cache(monkeypatch):
    cache = _Cache(200_000)
    monkeypatch.setattr("vision_ssm.scan.routes._cache", cache)

    def work(seed):
        for n in range(300):
            size = 1 + (n * (seed + 3)) % 40
            assert build_routes((ROWS,), size, 25).tokens == size * 25
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    assert 0 < cache.held <= cache.limit
    assert cache.held == sum(cache._size(routes) for routes in cache._routes.values())


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
        (lambda: build_routes([], 2, 2), "at least one route"),
        (lambda: build_routes([ROWS], 0, 2), "height and width must be at least 1, got 0 and 2"),
        (lambda: build_routes([ROWS, SkipSampled()], 4, 4), r"same number of steps, got \[16, 4\] on a 4x4 map"),
    ],
    ids=["window", "offset", "step", "no paths", "empty map", "lengths"],
)
def test_bad_paths(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build_routes(ROWS, 2, 2), r"sequence of paths such as \(ROWS, COLUMNS\), got Rows\(\)"),
        (lambda: build_routes([ROWS, Rows], 2, 2), r"paths\[1\] must be a path such as .*got <class"),
        (lambda: build_routes("rows", 2, 2), r"paths\[0\] must be a path .*got 'r'"),
        (lambda: build_routes([ROWS], 2.0, 2), "height must be an integer, got 2.0"),
        (lambda: build_routes([ROWS], 2, torch.tensor([2, 3])), r"width must be an integer, got tensor"),
        (lambda: Routes(torch.tensor([[0]]), tokens=1.0), "tokens must be an integer, got 1.0"),
        (lambda: Routes([[0]], tokens=1), "read must be an integer tensor, got list"),
        (lambda: Windowed(2.0), "size must be an integer, got 2.0"),
    ],
    ids=["one path", "a class", "a string", "height", "width", "tokens", "list", "window"],
)
def test_wrong_types(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_sizes_of_other_integer_types():
    assert build_routes([ROWS], np.int64(2), torch.tensor(3)) is build_routes((ROWS,), 2, 3)


@pytest.mark.parametrize("found", [[0, 1], None, torch.zeros(2), torch.zeros(1, 2, dtype=torch.int64)], ids=str)
def test_what_a_path_returns_is_checked(found):
    @dataclass(frozen=True)
    class Mine(ScanPath):
        def tokens(self, height, width, device=None):
            return found

    with pytest.raises(TypeError, match=r"tokens of .*Mine.* must be an integer tensor of one dimension, got"):
        build_routes((Mine(),), 1, 2)
