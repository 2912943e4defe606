"""The compiled CPU kernel against attention in float64, and how it is built."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_attention import dense
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from regroup.attention.backends import cpu as cpu_decode
from regroup.attention.call import Call, make_call
from regroup.attention.cpu import build as cpu_build

# How many OpenMP runtimes there are before and after a call of the kernel.
_RUNTIMES = """
import torch
from regroup.attention import make_call
from regroup.attention.backends import cpu as cpu_decode
from regroup.attention.cpu import build as cpu_build

def count():
    files = {line.split()[-1].rpartition("/")[2] for line in open("/proc/self/maps") if "omp" in line}
    return sum(file.startswith(("libgomp", "libiomp", "libomp")) for file in files)

print(count())
call = make_call(*(torch.randn(1, 1, length, 64) for length in (1, 3000, 3000)))
assert cpu_decode.unsupported_reason(call) is None
cpu_decode.run(call)
print(cpu_build.parallel() != 0, count())
"""
TINY = make_call(torch.ones(1, 2, 1, 8), torch.ones(1, 1, 3, 8), torch.ones(1, 1, 3, 8))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def built() -> None:
    missing = cpu_build.build().unsupported_reason
    if missing:
        pytest.skip(missing)


def tensors(
    B: int, G: int, group: int, T: int, S: int, D: int, Dv: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, and views of key and value in the middle of larger blocks, which hold what must not be read."""
    query = torch.randn(B, G * group, T, D).to(dtype)
    key = torch.full((B + 1, S + 9, G, D), float("nan"), dtype=dtype)[1:, 4 : S + 4].transpose(1, 2)
    value = torch.full((B, G + 2, S + 9, Dv), float("nan"), dtype=dtype)[:, 1 : G + 1, :S]
    key.copy_(torch.randn(B, G, S, D))
    value.copy_(torch.randn(B, G, S, Dv))
    return query, key, value


def run(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Tensor:
    call = make_call(query, key, value, **arguments)
    assert cpu_decode.unsupported_reason(call) is None
    return cpu_decode.run(call)


def assert_near(got: Tensor, expected: Tensor, most: float = 2e-6) -> None:
    assert got.shape == expected.shape
    error = (got.double() - expected).abs().max().item()
    assert error <= most * max(1.0, expected.abs().max().item())


def far(got: Tensor, expected: Tensor) -> bool:
    return (got.double() - expected).abs().max().item() > 1e-3


@pytest.mark.usefixtures("built")
class TestResults:
    @pytest.mark.parametrize("S", [1, 2, 63, 64, 65, 1000])
    @pytest.mark.parametrize("group", [1, 3, 7, 8, 32])
    @pytest.mark.parametrize("D", [8, 20, 80, 128, 256])
    def test_shapes(self, D: int, group: int, S: int) -> None:
        inputs = tensors(2, 2, group, 1, S, D, D)
        assert_near(run(*inputs), dense(*inputs))

    @pytest.mark.parametrize("T", [2, 5, 16, 33])
    @pytest.mark.parametrize("group", [1, 3, 8])
    def test_several_queries(self, group: int, T: int) -> None:
        inputs = tensors(1, 2, group, T, 150, 33, 33)
        assert_near(run(*inputs, is_causal=True), dense(*inputs, is_causal=True))
        assert far(run(*inputs, is_causal=True), dense(*inputs))

    @pytest.mark.parametrize("Dv", [1, 7, 16, 24, 100, 130])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_values_of_another_width(self, Dv: int, dtype: torch.dtype) -> None:
        inputs = tensors(2, 2, 3, 2, 77, 40, Dv, dtype)
        assert_near(run(*inputs), dense(*inputs), {torch.float32: 2e-6, torch.bfloat16: 1e-2}.get(dtype, 2e-3))

    @pytest.mark.parametrize("group", [1, 4, 32])
    @pytest.mark.parametrize("window", [1, 2, 63, 64, 500])
    def test_window(self, window: int, group: int) -> None:
        inputs = tensors(2, 2, group, 3, 300, 16, 16)
        for is_causal in (True, False):
            got = run(*inputs, window=window, is_causal=is_causal)
            assert_near(got, dense(*inputs, window=window, is_causal=is_causal))
            if window < 300:
                assert far(got, dense(*inputs, window=window + 1, is_causal=is_causal))

    def test_a_window_reads_nothing_outside_it(self) -> None:
        query, key, value = tensors(1, 2, 4, 1, 1000, 16, 16)
        expected = dense(query, key, value, window=40, is_causal=True)
        key[:, :, :960] = float("nan")
        value[:, :, :960] = float("nan")
        assert_near(run(query, key, value, window=40, is_causal=True), expected)

    @pytest.mark.parametrize("group", [1, 8, 32])
    @pytest.mark.parametrize("cap", [0.5, 30.0])
    def test_softcap(self, cap: float, group: int) -> None:
        inputs = tensors(1, 2, group, 1, 200, 64, 64)
        got = run(*inputs, softcap=cap, scale=1.0)
        assert_near(got, dense(*inputs, softcap=cap, scale=1.0), 5e-6)
        assert far(got, dense(*inputs, scale=1.0))

    def test_a_softcap_far_away_changes_nothing(self) -> None:
        inputs = tensors(1, 2, 4, 1, 200, 64, 64)
        assert_near(run(*inputs, softcap=1e4), dense(*inputs))

    @pytest.mark.parametrize("group", [1, 8, 13])
    def test_ragged_padding(self, group: int) -> None:
        inputs = tensors(4, 2, group, 1, 700, 16, 16)
        for left in (False, True):
            lengths = torch.tensor([700, 1, 300, 0])[:, None]
            places = torch.arange(700)[None]
            mask = (places >= 700 - lengths if left else places < lengths)[:, None, None]
            got = run(*inputs, mask=mask)
            assert_near(got, dense(*inputs, mask=mask))
            assert (got[3] == 0).all()
            assert far(got, dense(*inputs))

    def test_padding_is_not_read(self) -> None:
        query, key, value = tensors(1, 2, 4, 1, 700, 16, 16)
        mask = (torch.arange(700) < 256)[None, None, None]
        expected = dense(query, key, value, mask=mask)
        key[:, :, 256:] = float("nan")
        value[:, :, 256:] = float("nan")
        assert_near(run(query, key, value, mask=mask), expected)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("shape", [(1, 1, 1, 130), (2, 1, 3, 130), (1, 14, 1, 130), (2, 14, 3, 130), (1, 14, 3, 1)])
    def test_bias_and_added_mask(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        inputs = tensors(2, 2, 7, 3, 130, 20, 20)
        bias, mask = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        got = run(*inputs, bias=bias, mask=mask, is_causal=True)
        assert_near(got, dense(*inputs, bias=bias, mask=mask, is_causal=True), 4e-6)
        if shape[3] > 1:
            assert far(got, dense(*inputs, bias=bias, is_causal=True))

    @pytest.mark.parametrize("shape", [(1, 1, 3, 130), (2, 6, 1, 130), (2, 6, 3, 130), (2, 1, 1, 1)])
    def test_bool_masks(self, shape: tuple[int, ...]) -> None:
        inputs = tensors(2, 2, 3, 3, 130, 20, 20)
        mask = torch.rand(shape) > 0.5
        assert_near(run(*inputs, mask=mask), dense(*inputs, mask=mask))
        turned = torch.rand(130, 3).T > 0.5
        assert_near(run(*inputs, mask=turned), dense(*inputs, mask=turned))

    def test_rows_that_see_nothing_are_zero(self) -> None:
        inputs = tensors(1, 2, 3, 2, 300, 16, 16)
        for mask in (torch.zeros(1, 1, 2, 300, dtype=torch.bool), torch.full((1, 1, 2, 300), float("-inf"))):
            mask[:, :, 1, 7] = True if mask.dtype == torch.bool else 0.0
            got = run(*inputs, mask=mask)
            assert (got[:, :, 0] == 0).all()
            assert_near(got[:, :3, 1], inputs[2][:, :1, 7].double().expand(1, 3, 16))

    def test_great_scores_do_not_overflow(self) -> None:
        query, key, value = tensors(1, 1, 4, 1, 500, 16, 16)
        assert_near(run(query * 1e3, key, value), dense(query * 1e3, key, value), 1e-4)

    def test_nan_is_not_hidden(self) -> None:
        query, key, value = tensors(1, 1, 4, 1, 500, 16, 16)
        query[0, 2, 0, 3] = float("nan")
        got = run(query, key, value)
        assert got[0, 2].isnan().all()
        assert not got[0, :2].isnan().any()

    def test_heads_are_not_interchangeable(self) -> None:
        query, key, value = tensors(1, 3, 2, 1, 50, 16, 16)
        got = run(query, key, value)
        assert far(got, dense(query, key.roll(1, 1), value))
        assert far(got, dense(query.unflatten(1, (3, 2)).transpose(1, 2).flatten(1, 2), key, value))

    @pytest.mark.parametrize("group", [1, 4, 8, 32])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_low_precision_is_as_good_as_torch(self, dtype: torch.dtype, group: int) -> None:
        for S in (64, 1000):
            query, key, value = tensors(2, 2, group, 1, S, 128, 128, dtype)
            expected = dense(query, key, value)
            ours = run(query, key, value).double() - expected
            theirs = scaled_dot_product_attention(query, key, value, enable_gqa=True).double() - expected
            assert ours.square().mean() <= 4 * theirs.square().mean()
            assert ours.abs().max() <= 2 * theirs.abs().max()

    def test_bfloat16_rows_of_odd_width(self) -> None:
        inputs = tensors(2, 2, 5, 1, 90, 33, 33, torch.bfloat16)
        assert_near(run(*inputs), dense(*inputs), 1e-2)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("B", "G", "group"), [(1, 1, 32), (1, 1, 1), (3, 2, 4)])
    def test_threads_and_repetition(self, B: int, G: int, group: int, dtype: torch.dtype) -> None:
        inputs = tensors(B, G, group, 1, 3000, 64, 64, dtype)
        before = torch.get_num_threads()
        results = {}
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                results[threads] = run(*inputs)
                assert all(torch.equal(run(*inputs), results[threads]) for _ in range(5))
        finally:
            torch.set_num_threads(before)
        assert_near(results[1], results[2].double(), 1e-6 if dtype == torch.float32 else 1e-2)

    def test_under_compile(self) -> None:
        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            call = make_call(query, key, value, is_causal=True, window=50)
            return cpu_decode.run(call) + 1 if cpu_decode.unsupported_reason(call) is None else query

        inputs = tensors(1, 2, 4, 1, 100, 16, 24)
        compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
        assert_near(compiled(*inputs), dense(*inputs, is_causal=True, window=50) + 1)

    def test_the_registered_operator(self) -> None:
        arguments = (*tensors(1, 2, 4, 1, 100, 16, 24), None, None, True, 0.25, 50, None)
        torch.library.opcheck(cpu_decode._op, arguments)

    def test_one_pool_of_threads(self) -> None:
        """In a process of its own: other packages may have brought a runtime to this one (sentencepiece does)."""
        done = subprocess.run([sys.executable, "-c", _RUNTIMES], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["1", "True", "1"]


def _call(**changes: Any) -> Call:
    return Call(**{**TINY.__dict__, **changes})


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (_call(query=torch.ones(1, 2, 1, 8, device="meta")), "meta"),
        (_call(query=torch.ones(1, 2, 1, 8, dtype=torch.float64)), "float64"),
        (_call(query=torch.ones(1, 2, 1, 8, requires_grad=True)), "gradients"),
        (_call(query=torch.ones(1, 2, 65, 8)), "65 queries"),
        (_call(key=torch.ones(1, 1, 8, 3).mT), "contiguous"),
        (_call(mask=torch.ones(1, 1, 1, 3, dtype=torch.float64)), "mask"),
    ],
)
def test_what_it_does_not_serve(call: Call, word: str) -> None:
    assert word in (cpu_decode.unsupported_reason(call) or "")


class TestBuilding:
    """Each with a build of its own, in place of the one that the process keeps."""

    @pytest.fixture(autouse=True)
    def _cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        cpu_build.build()  # the one of the process belongs in the user's cache
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.delenv("CXX", raising=False)

    @pytest.fixture
    def copier(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A compiler that takes its time to copy a library that is there, and keeps a log of its calls."""
        library = cpu_build.build().library
        if library is None:
            pytest.skip("there is no library to copy")
        log = tmp_path / "log"
        script = tmp_path / "compiler"
        script.write_text(
            f'#!/bin/sh\n[ "$2" = "" ] && exit 0\necho built >> {log}\nfor last; do :; done\n'
            f'head -c 1000 {library._name} > "$last"\nsleep 0.2\ncat {library._name} > "$last"\n'
        )
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return log

    def test_no_compiler(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "/nowhere")
        found = cpu_build.build.__wrapped__()
        assert found.library is None
        monkeypatch.setattr(cpu_build, "build", lambda: found)
        reason = cpu_decode.unsupported_reason(TINY)
        assert reason is not None
        assert "no C++ compiler" in reason
        assert "install" in reason

    def test_a_compiler_that_is_not_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CXX", "no-such-compiler")
        assert "no-such-compiler" in (cpu_build.build.__wrapped__().unsupported_reason or "")

    def test_a_compiler_that_fails(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        script = tmp_path / "compiler"
        script.write_text("#!/bin/sh\necho 'fatal error: no <cstdint>' >&2\nexit 1\n")
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        assert "no <cstdint>" in (cpu_build.build.__wrapped__().unsupported_reason or "")
        assert list((tmp_path / "cache" / "regroup").iterdir()) == []
        assert capfd.readouterr() == ("", "")

    def test_built_once(self, copier: Path, tmp_path: Path) -> None:
        assert all(cpu_build.build.__wrapped__().unsupported_reason is None for _ in range(3))
        assert copier.read_text() == "built\n"
        assert len(list((tmp_path / "cache" / "regroup").iterdir())) == 1

    def test_built_again_for_another_torch(self, copier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        cpu_build.build.__wrapped__()
        monkeypatch.setattr(torch, "__version__", "0.0")
        cpu_build.build.__wrapped__()
        assert copier.read_text() == "built\nbuilt\n"

    @pytest.mark.usefixtures("copier")
    def test_two_at_once(self, tmp_path: Path) -> None:
        results: list[cpu_build.Built] = []
        threads = [threading.Thread(target=lambda: results.append(cpu_build.build.__wrapped__())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [result.unsupported_reason for result in results] == [None] * 4
        assert all(isinstance(result.library, ctypes.CDLL) for result in results)
        assert [path.suffix for path in (tmp_path / "cache" / "regroup").iterdir()] == [".so"]

    @pytest.mark.usefixtures("copier")
    def test_a_cache_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "cache").write_text("a file, not a folder")
        found = cpu_build.build.__wrapped__()
        assert found.unsupported_reason is None
        assert found.library is not None
        assert found.library.regroup_features() >= 0

    @pytest.mark.parametrize("quoted", ['g++ "', "'"])
    def test_a_command_that_cannot_be_read(self, quoted: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CXX", quoted)
        assert "$CXX" in (cpu_build.build.__wrapped__().unsupported_reason or "")

    def test_a_compiler_that_speaks_another_encoding(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        script = tmp_path / "compiler"
        script.write_text("#!/bin/sh\nprintf '\\377\\376 error\\n' >&2\nprintf '\\377\\n'\nexit 1\n")
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        assert "error" in (cpu_build.build.__wrapped__().unsupported_reason or "")

    def test_a_compiler_that_writes_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What cannot be loaded is not kept."""
        monkeypatch.setenv("CXX", "true")
        assert "too short" in (cpu_build.build.__wrapped__().unsupported_reason or "")
        assert list((tmp_path / "cache" / "regroup").iterdir()) == []

    def test_a_cache_beside_the_working_folder_does_not_count(
        self, copier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("XDG_CACHE_HOME", "here")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert cpu_build.build.__wrapped__().unsupported_reason is None
        assert not (tmp_path / "here").exists()
        assert list((tmp_path / "home" / ".cache" / "regroup").iterdir())

    @pytest.mark.usefixtures("copier")
    @pytest.mark.parametrize("whose", ["ours", "open folder", "open file", "open above", "another's file", "damaged"])
    def test_what_others_could_have_written_is_not_loaded(
        self, whose: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tmp_path / "cache" / "regroup"
        assert cpu_build.build.__wrapped__().unsupported_reason is None
        (library,) = folder.iterdir()
        assert folder.stat().st_mode & 0o777 == 0o700
        if whose == "open folder":  # an earlier version made it as the umask says: it is closed, and used
            folder.chmod(0o777)
        elif whose == "open file":
            library.chmod(0o666)
        elif whose == "open above":
            folder.parent.chmod(0o777)
        elif whose == "another's file":
            if os.getuid() == 0:
                os.chown(library, 12345, -1)
            else:
                monkeypatch.setattr(os, "getuid", lambda: 12345)
        elif whose == "damaged":
            # Elsewhere: by the same path the loader would give what it has loaded.
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
            other = tmp_path / "other" / "regroup" / library.name
            other.parent.mkdir(parents=True, mode=0o700)
            other.write_bytes(library.read_bytes()[:100])
            folder, library = other.parent, other
        found = cpu_build.build.__wrapped__().library
        assert found is not None
        assert (found._name == str(library)) == (whose in ("ours", "open folder"))
        assert folder.stat().st_mode & 0o777 == 0o700
        assert library.exists() == (whose != "damaged")
