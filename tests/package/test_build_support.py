"""setup.py finds the GPU toolkit, in the right folders, and compiles for the right architectures."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from build_support import gpu
from build_support.gpu import NoGpuCode, find_toolkit, gencode_flags, toolkit_homes

ROOT = Path(__file__).parents[2]
CUDA_13 = ["75", "80", "86", "87", "88", "89", "90", "100", "103", "110", "120", "121"]  # nvcc --list-gpu-code
TORCH = ["75", "80", "86", "90", "100", "120"]  # torch 2.14's wheels of CUDA 13.0


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make a machine of these files alone; those named nvcc or hipcc are programs."""
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site-packages")])
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))

    def make(*names: str) -> None:
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
            if path.name == "nvcc":
                program(path, f"echo '#$ _HERE_={path.parent}'")

    return make


def program(path: Path, lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)


def found(root: Path, torch_major: int | None = 13, **environment: str) -> tuple[str, str, str]:
    """Return the parts of the toolkit that is taken, from the root of the machine."""
    toolkit = find_toolkit(toolkit_homes(environment, root), torch_major)
    nvcc, include, runtime = (path.relative_to(root).as_posix() for path in toolkit)
    return nvcc, include, runtime


# ---- toolkits ----


def test_the_toolkit_of_nvidias_installer(tree: Callable[..., None], tmp_path: Path) -> None:
    for version in ("9.2", "12.9", "13.0"):
        home = f"usr/local/cuda-{version}"
        tree(f"{home}/bin/nvcc", f"{home}/include/cuda_runtime.h", f"{home}/lib64/libcudart_static.a")
    assert found(tmp_path)[0] == "usr/local/cuda-13.0/bin/nvcc", "the newest"
    older = tmp_path / "usr/local/cuda-12.9"
    assert found(tmp_path, CUDA_HOME=str(older))[0] == "usr/local/cuda-12.9/bin/nvcc", "what the user named"


def test_the_toolkit_of_conda(tree: Callable[..., None], tmp_path: Path) -> None:
    parts = "conda/targets/x86_64-linux"
    tree("conda/bin/nvcc", f"{parts}/include/cuda_runtime.h", f"{parts}/lib/libcudart_static.a")
    expected = ("conda/bin/nvcc", f"{parts}/include", f"{parts}/lib/libcudart_static.a")
    assert found(tmp_path, CONDA_PREFIX=str(tmp_path / "conda")) == expected


def test_the_toolkit_of_pips_wheels_of_cuda_13(tree: Callable[..., None], tmp_path: Path) -> None:
    home = "site-packages/nvidia/cu13"
    tree(f"{home}/bin/nvcc", f"{home}/include/cuda_runtime.h", f"{home}/lib/libcudart.so.13")
    assert found(tmp_path) == (f"{home}/bin/nvcc", f"{home}/include", f"{home}/lib/libcudart.so.13")
    tree(f"{home}/lib/libcudart_static.a")
    assert found(tmp_path)[2] == f"{home}/lib/libcudart_static.a", "works with any torch"


def test_the_toolkit_of_pips_wheels_of_cuda_12(tree: Callable[..., None], tmp_path: Path) -> None:
    home = "site-packages/nvidia"
    tree(f"{home}/cuda_nvcc/bin/nvcc", f"{home}/cuda_runtime/include/cuda_runtime.h")
    tree(f"{home}/cuda_runtime/lib/libcudart.so.12")
    runtime = f"{home}/cuda_runtime/lib/libcudart.so.12"
    assert found(tmp_path, torch_major=12) == (f"{home}/cuda_nvcc/bin/nvcc", f"{home}/cuda_runtime/include", runtime)


def test_the_toolkit_of_debian(tree: Callable[..., None], tmp_path: Path) -> None:
    tree("usr/lib/nvidia-cuda-toolkit/bin/nvcc", "usr/include/cuda_runtime.h")
    tree("usr/lib/x86_64-linux-gnu/libcudart_static.a")
    expected = ("usr/lib/nvidia-cuda-toolkit/bin/nvcc", "usr/include", "usr/lib/x86_64-linux-gnu/libcudart_static.a")
    assert found(tmp_path) == expected


def test_a_script_on_path_leads_to_the_real_compiler(tree: Callable[..., None], tmp_path: Path) -> None:
    tree("cuda/bin/nvcc", "cuda/include/cuda_runtime.h", "cuda/lib64/libcudart_static.a")
    program(tmp_path / "bin/nvcc", f'exec "{tmp_path}/cuda/bin/nvcc" "$@"')
    assert found(tmp_path, PATH=str(tmp_path / "bin"))[0] == "cuda/bin/nvcc"


def test_what_is_incomplete_is_passed_over_and_said(tree: Callable[..., None], tmp_path: Path) -> None:
    tree("mine/bin/nvcc", "mine/include/cuda_runtime.h", "mine/lib64/libcudart.so.12")
    with pytest.raises(NoGpuCode, match=r"mine/bin/nvcc has no libcudart_static\.a beside it; set CUDA_HOME"):
        found(tmp_path, CUDA_HOME=str(tmp_path / "mine"))  # torch has loaded the runtime of CUDA 13
    home = "usr/local/cuda"
    tree(f"{home}/bin/nvcc", f"{home}/include/cuda_runtime.h", f"{home}/lib64/libcudart_static.a")
    assert found(tmp_path, CUDA_HOME=str(tmp_path / "mine"))[0] == f"{home}/bin/nvcc"


def test_without_a_toolkit_the_reason_says_so(tree: Callable[..., None], tmp_path: Path) -> None:
    with pytest.raises(NoGpuCode, match="no CUDA toolkit found; set CUDA_HOME"):
        found(tmp_path)


# ---- architectures ----


@pytest.fixture(autouse=True)
def listed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return what sets TORCH_CUDA_ARCH_LIST."""
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    return lambda value: monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", value)


def code(*names: str) -> list[str]:
    return [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]


def ptx(*names: str) -> list[str]:
    return [f"-gencode=arch=compute_{name},code=compute_{name}" for name in names]


def test_by_default_it_is_what_torch_was_built_for_with_ptx_of_the_newest(listed: Callable[[str], None]) -> None:
    assert gencode_flags(CUDA_13, TORCH) == [*code(*TORCH), *ptx("120")]
    listed("")
    assert gencode_flags(CUDA_13) == [*code("75", "80", "90", "100", "120"), *ptx("120")]


def test_what_nvcc_does_not_know_is_left_out_of_the_default() -> None:
    cuda_12_4 = ["50", "60", "70", "75", "80", "86", "89", "90", "90a"]
    assert gencode_flags(cuda_12_4, TORCH) == [*code("75", "80", "86", "90"), *ptx("90")]
    with pytest.raises(NoGpuCode, match="none of sm_50, sm_60"):
        gencode_flags(CUDA_13, ["50", "60"])


def test_the_gpu_at_hand_is_always_among_them(
    listed: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert gencode_flags(CUDA_13, ["80", "90"], ["89"]) == [*code("80", "89", "90"), *ptx("90")]
    assert gencode_flags(CUDA_13, ["90a"], ["90"]) == [*code("90"), *ptx("90")], "features are of one chip"
    listed("native")
    assert gencode_flags(CUDA_13, TORCH, ["90"]) == [*code("90"), *ptx("90")]
    assert capsys.readouterr().err == ""
    assert gencode_flags(CUDA_13, ["80", "90"]) == [*code("80", "90"), *ptx("90")]
    assert "=native, and torch sees no GPU: compiled for sm_80, sm_90" in capsys.readouterr().err
    assert gencode_flags(CUDA_13, TORCH) == [*code(*TORCH), *ptx("120")], "without a GPU, all"


@pytest.mark.parametrize(
    ("value", "flags"),
    [
        ("8.0;9.0+PTX", [*code("80", "90"), *ptx("90")]),
        ("7.5 8.0 8.6 9.0 10.0 12.0+PTX", [*code("75", "80", "86", "90", "100", "120"), *ptx("120")]),
        ("9.0a", code("90a")),
        ("Turing;Ampere", [*code("75", "80", "86"), *ptx("75", "86")]),
    ],
)
def test_a_list_is_read_as_torch_reads_it(listed: Callable[[str], None], value: str, flags: list[str]) -> None:
    listed(value)
    assert sorted(gencode_flags(CUDA_13, TORCH, ["75"])) == sorted(flags)


@pytest.mark.parametrize("value", ["Hoper", "9", "sm_90", "9.0+ptx"])
def test_a_wrong_name_is_refused(listed: Callable[[str], None], value: str) -> None:
    listed(value)
    with pytest.raises(NoGpuCode, match=rf"TORCH_CUDA_ARCH_LIST='{re.escape(value)}': Unknown CUDA arch"):
        gencode_flags(CUDA_13)


def test_an_architecture_that_nvcc_dropped_is_named(listed: Callable[[str], None]) -> None:
    listed("7.0;8.0")
    with pytest.raises(NoGpuCode, match=r"does not compile for sm_70 \(TORCH_CUDA_ARCH_LIST='7.0;8.0'\)"):
        gencode_flags(CUDA_13)


# ---- the compilation ----


@pytest.fixture
def toolkit(tree: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a toolkit whose nvcc writes down its arguments."""
    tree("cuda/include/cuda_runtime.h", "cuda/lib64/libcudart_static.a")
    names = "\\n".join(f"sm_{name}" for name in CUDA_13)
    log = f'echo "$@" >> {tmp_path}/log'
    program(tmp_path / "cuda/bin/nvcc", f'{log}; [ "$1" = --list-gpu-code ] && printf "{names}\\n"; exit 0')
    for name in ("MAX_JOBS", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("FASTEMA_CUDA", "1")
    monkeypatch.setattr(torch.version, "hip", None)
    return tmp_path / "cuda"


def test_all_architectures_are_compiled_at_once(toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", "3")
    parts = gpu.compile_gpu_code(tmp_path / "build")
    assert parts[:2] == [str(tmp_path / "build/cuda_kernels.o"), str(toolkit / "lib64/libcudart_static.a")]
    command = (tmp_path / "log").read_text().splitlines()[-1].split()
    assert {"-c", "--fmad=false", code("75")[0], code("90")[0]} <= set(command)
    assert command[command.index("--threads") + 1] == "3"


def test_what_the_compiler_said_is_the_reason(toolkit: Path, tmp_path: Path) -> None:
    program(
        toolkit / "bin/nvcc", "echo sm_90; [ $1 = --list-gpu-code ] || { echo 'x.h: error: unsupported gcc'; exit 2; }"
    )
    with pytest.raises(NoGpuCode, match=r"nvcc failed with status 2: x\.h: error: unsupported gcc"):
        gpu.compile_gpu_code(tmp_path / "build")


def test_a_cpu_torch_gets_no_kernels_unless_they_are_asked_for(
    toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setenv("FASTEMA_CUDA", "")
    with pytest.raises(NoGpuCode, match="torch is a CPU build"):
        gpu.compile_gpu_code(tmp_path / "build")
    monkeypatch.setenv("FASTEMA_CUDA", "0")
    with pytest.raises(NoGpuCode, match="FASTEMA_CUDA=0"):
        gpu.compile_gpu_code(tmp_path / "build")


def test_on_rocm_hipcc_compiles_the_same_source(toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """hipcc only writes down its arguments here: nothing was run on an AMD GPU."""
    monkeypatch.setattr(torch.version, "hip", "6.4.0")
    monkeypatch.setattr(torch, "__version__", "2.11.0+rocm6.4")
    monkeypatch.setattr(gpu, "_torch_architectures", lambda: ["gfx90a:sramecc+:xnack-", "gfx942"])
    monkeypatch.delenv("PYTORCH_ROCM_ARCH", raising=False)
    monkeypatch.setenv("ROCM_HOME", str(tmp_path / "rocm"))
    program(tmp_path / "rocm/bin/hipcc", f'echo "$@" > {tmp_path}/log')
    assert gpu.compile_gpu_code(tmp_path / "build")[1:] == [f"-L{tmp_path / 'rocm/lib'}", "-lamdhip64"]
    command = (tmp_path / "log").read_text().split()
    assert command[:2] == ["-x", "hip"] and str(gpu.SOURCE) in command
    assert [word for word in command if "offload" in word] == ["--offload-arch=gfx90a", "--offload-arch=gfx942"]
    monkeypatch.setenv("PYTORCH_ROCM_ARCH", "gfx1100")
    gpu.compile_gpu_code(tmp_path / "build")
    assert "--offload-arch=gfx1100" in (tmp_path / "log").read_text()
    monkeypatch.setattr(torch, "__version__", "2.6.0")
    with pytest.raises(NoGpuCode, match=r"on ROCm the kernels need torch 2\.11"):
        gpu.compile_gpu_code(tmp_path / "build")


def test_rocm_without_hipcc_is_a_reason(tmp_path: Path) -> None:
    if Path("/opt/rocm/bin/hipcc").exists():
        pytest.skip("this machine has ROCm")
    with pytest.raises(NoGpuCode, match="there is no hipcc; set ROCM_HOME"):
        gpu.find_rocm({"PATH": str(tmp_path)})


# ---- setuptools ----


@pytest.mark.parametrize("version", ["65.5.0", "76.1.0", "77.0.1"])
def test_an_old_setuptools_is_told_before_it_fails(tmp_path: Path, version: str) -> None:
    (tmp_path / "setuptools.py").write_text(
        f"__version__ = {version!r}\ndef setup(**arguments): print('set up')\n"
        "def find_packages(**arguments): return []\n"
    )
    result = subprocess.run(
        [sys.executable, "-S", "setup.py", "dist_info"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "FASTEMA_CUDA": ""},
        capture_output=True,
        text=True,
    )
    if version < "77":
        assert result.returncode != 0
        assert "pip install 'setuptools>=77'" in result.stderr
        assert "Traceback" not in result.stderr
    else:
        assert result.returncode == 0, result.stderr
        assert "set up" in result.stdout
