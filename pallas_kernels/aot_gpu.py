"""The GPU kernels compiled ahead of time for an H100, on a machine without one: registers, spills and shared memory of each.

    python -m pallas_kernels.aot_gpu [--tokens 4096] [--width 2048] [--inner 8192] [--dtype bfloat16] [--out gpu_aot.json]

Needs the CUDA plugin of this jax and NVIDIA's compiler, but no driver: pip install 'monovl_jax[aot-cuda]'. It proves that XLA and ptxas
accept the code, which says nothing of numbers (the tests do, in the interpreter) or of times.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import make_routing, routed_linear, routed_swiglu

H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  device_memory_size: 84942979072 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 1 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""What XLA wants to know of an H100, from its data sheet."""


def missing() -> str | None:
    """What has to be installed first, in words; None where all is there."""
    absent = [name for name in ("jax_plugins.xla_cuda12", "nvidia.cuda_nvcc") if not _folder(name)]
    return f"{' and '.join(absent)} not found: pip install 'monovl_jax[aot-cuda]'" if absent else None


def _folder(package: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        return None
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


def environment() -> dict[str, str]:
    """What a process must be started with in order to compile for an H100 and to tell what came of it. Raises FileNotFoundError."""
    nvcc = _folder("nvidia.cuda_nvcc")
    if nvcc is None or missing():
        raise FileNotFoundError(missing())
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PATH": f"{nvcc / 'bin'}:{os.environ.get('PATH', '')}",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_cuda_data_dir={nvcc} --xla_gpu_autotune_level=0".strip(),
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "MOSAIC_GPU_DUMP_HOST_LLVM": "1",
    }


def compile_for_h100(f: Callable[..., Any], *args: Any) -> Any:
    """f compiled for one H100, in a process started with `environment()`. args: ShapeDtypeStructs in pytrees."""
    chips = topologies.get_topology_desc(platform="cuda", topology_name="h100", target_config=H100, topology="1x1x1").devices
    mesh = Mesh(np.array(chips[:1]), ("chip",))
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, PartitionSpec())), args)
    whole = jax.shard_map(f, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    return jax.jit(whole).trace(*args).lower().compile()


def cases(tokens: int, width: int, inner: int, dtype: Any) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """The programs that are compiled. The text expert is frozen in those that train."""

    def array(*shape: int, dtype: Any = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    def swiglu(x: Any, text: Any, visual: Any, expert: Any) -> Any:
        return routed_swiglu(x, (text, visual), make_routing(expert), "pallas_gpu")

    @jax.checkpoint
    def recomputed(x: Any, text: Any, visual: Any, expert: Any) -> Any:
        return routed_swiglu(x, (text, visual), make_routing(expert), "pallas_gpu", recomputed=True)

    def linear(x: Any, text: Any, visual: Any, expert: Any) -> Any:
        return routed_linear(x, (text, visual), make_routing(expert), implementation="pallas_gpu")

    def training(layer: Callable[..., Any]) -> Callable[..., Any]:
        def run(x: Any, text: Any, visual: Any, expert: Any, dy: Any) -> Any:
            y, pull = jax.vjp(lambda x, visual: layer(x, text, visual, expert), x, visual)
            return y, pull(dy)

        return run

    x, expert, kernel = array(tokens, width), array(tokens, dtype=jnp.int32), array(width, inner)
    ffn = (kernel, kernel, array(inner, width))
    return {
        "swiglu forward": (swiglu, (x, ffn, ffn, expert)),
        "swiglu forward + backward, text frozen": (training(swiglu), (x, ffn, ffn, expert, x)),
        "swiglu under full remat, text frozen": (training(recomputed), (x, ffn, ffn, expert, x)),
        "linear forward + backward, text frozen": (training(linear), (x, kernel, kernel, expert, array(tokens, inner))),
    }


MARK = "compiling: "


def kernels_in(output: str) -> list[dict[str, Any]]:
    """What ptxas said of each kernel, and the shared memory that its launch asks for."""
    found = []
    for part in output.split("Compiling entry function '")[1:]:
        numbers = {
            "registers": r"Used (\d+) registers",
            "spill_stores": r"(\d+) bytes spill stores",
            "spill_loads": r"(\d+) bytes spill loads",
        }
        found.append({"kernel": part.split("_mosaic_gpu")[0], **{k: int(re.findall(p, part)[0]) for k, p in numbers.items()}})
    launches = re.findall(r"call void @mosaic_gpu_launch_kernel\(ptr [^,]+, (?:i32 \d+, ){9}i32 (\d+)", output)
    if len(launches) != len(found):
        raise ValueError(f"{len(found)} kernels were compiled, but {len(launches)} launches were found in what the compiler printed")
    return [{**kernel, "shared_memory": int(size)} for kernel, size in zip(found, launches, strict=True)]


def report(tokens: int = 4096, width: int = 2048, inner: int = 8192, dtype: str = "bfloat16") -> dict[str, Any]:
    """Compiles `cases` in a process of its own. Raises FileNotFoundError without the packages, RuntimeError with the compiler's words."""
    sizes = {"tokens": tokens, "width": width, "inner": inner, "dtype": dtype}
    arguments = [str(a) for name, value in sizes.items() for a in (f"--{name}", value)]
    command = [sys.executable, "-m", "pallas_kernels.aot_gpu", "--here", *arguments]
    child = subprocess.run(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False
    )
    if child.returncode:
        raise RuntimeError(f"the GPU kernels did not compile: {child.stdout[-2000:]}")
    programs = {}
    for part in child.stdout.split(MARK)[1:]:
        case, output = part.split("\n", 1)
        result = json.loads(re.findall(r"^compiled: (.*)$", output, re.MULTILINE)[0])
        programs[case] = {**result, "kernels": kernels_in(output)}
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12")}
    return {"target": "H100 SXM (sm_90a), compiled ahead of time, never run", **sizes, "versions": versions, "programs": programs}


def _compile_here(tokens: int, width: int, inner: int, dtype: str) -> None:
    for case, (f, args) in cases(tokens, width, inner, jnp.dtype(dtype)).items():
        print(f"{MARK}{case}", flush=True)
        program = compile_for_h100(f, *args)
        calls = len(re.findall("custom_call_target=.mosaic_gpu", program.as_text()))
        result = {"kernel_calls": calls, "temporary_bytes": program.memory_analysis().temp_size_in_bytes}
        print(f"\ncompiled: {json.dumps(result)}", flush=True)


def show(tokens: int, width: int, inner: int, dtype: str, out: Path | None) -> None:
    """Prints `report` as a table and writes it to `out` as JSON."""
    if reason := missing():
        raise SystemExit(reason)
    result = report(tokens, width, inner, dtype)
    print(f"{tokens} tokens, {width} -> {inner}, {dtype}, for an H100; registers of a thread at launch, bytes")
    for case, program in result["programs"].items():
        print(f"{case}: {program['kernel_calls']} kernel calls, {program['temporary_bytes'] / 2**20:.0f} MiB of temporaries")
        for k in program["kernels"]:
            spills = f"{k['spill_stores']} + {k['spill_loads']} spilled"
            print(f"    {k['kernel']:24} {k['registers']:4} registers  {spills:16} {k['shared_memory']:7} shared memory")
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=8192)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.here:
        _compile_here(a.tokens, a.width, a.inner, a.dtype)
    else:
        show(a.tokens, a.width, a.inner, a.dtype, a.out)


if __name__ == "__main__":
    main()
