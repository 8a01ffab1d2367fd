"""What a conversion costs at the true 2B size: time against a plain copy, and memory.

    python -m experiments.benchmarks.convert [--rounds 1] [--out experiments/results/convert.json]

Makes 6.2 GB of random bfloat16 weights in the released layout in a temporary folder (25 GB of disk in all while it runs), then, each in
a process of its own and from a warm page cache:

    copy     `cp` of the model folder, and reading the copy with safetensors, tensor by tensor
    import   `monovl convert import`
    export   `monovl convert export` of that, compared byte by byte with the source

The result is the ratio of the times, and the peak of RssAnon (memory that is no file's) and of RSS, seen by looking every 10 ms.
Bars: at most 1.5 times the copy, and less than 2 GB of RssAnon.
"""

from __future__ import annotations

import filecmp
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from monovl_jax.config import ModelConfig, config_to_json, named_config
from monovl_jax.convert.arrays import FLOATS
from monovl_jax.convert.exporter import state_dict_order
from monovl_jax.convert.safetensors_out import SafetensorsWriter, Tensor, divide

BF16 = FLOATS["BF16"]

READ_BACK = """
import sys
import ml_dtypes  # numpy learns bfloat16 from it
from safetensors import safe_open
for file in sys.argv[1:]:
    with safe_open(file, framework="numpy") as tensors:
        for name in tensors.keys():
            tensors.get_tensor(name)
"""
CONVERT = """
import sys
from monovl_jax.convert.exporter import export_model
from monovl_jax.convert.importer import import_model
{"import": import_model, "export": export_model}[sys.argv[1]](sys.argv[2], sys.argv[3])
"""


def random_model(folder: Path, config: ModelConfig, seed: int = 0) -> None:
    """A released folder whose weights are random bits of finite bfloat16 numbers."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    tensors = [Tensor(row.name.format(layer=layer), row.shape, BF16) for row, layer in state_dict_order(config)]
    with SafetensorsWriter(folder, divide(tensors, 5_000_000_000)) as writer:
        for tensor in tensors:
            bits = rng.integers(0, 1 << 16, tensor.shape, dtype=np.uint16)
            writer.write(tensor.name, (bits & np.uint16(0xBFFF)).view(BF16))  # without the top bit of the exponent: below 2, never inf
    (folder / "config.json").write_text(config_to_json(config), encoding="utf-8")


def memory(pid: int) -> tuple[float, float]:
    """(RssAnon, RSS) of a process in GB; zeros when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0.0, 0.0
    values = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("RssAnon", "VmRSS"))}
    return float(values.get("RssAnon", 0)) / 1e6, float(values.get("VmRSS", 0)) / 1e6


def watched(command: list[str]) -> dict[str, float]:
    """Runs a command and looks at its memory meanwhile. Raises CalledProcessError when it fails."""
    began = time.perf_counter()
    process = subprocess.Popen(command, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    anonymous = resident = 0.0
    while process.poll() is None:
        now = memory(process.pid)
        anonymous, resident = max(anonymous, now[0]), max(resident, now[1])
        time.sleep(0.01)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return {"seconds": seconds, "rss_anon_gb": anonymous, "rss_gb": resident}


def settle(folder: Path) -> None:
    """Writes everything out and reads the folder once, so that every measurement begins with the same page cache."""
    os.sync()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def round_of(work: Path, source: Path) -> dict[str, dict[str, float]]:
    """The three measurements, one after another."""
    copy, imported, exported = work / "copy", work / "imported", work / "exported"
    settle(source)
    copied = watched(["cp", "-r", str(source), str(copy)])
    read = watched([sys.executable, "-c", READ_BACK, *map(str, sorted(copy.glob("*.safetensors")))])
    shutil.rmtree(copy)
    settle(source)
    results = {"copy": {"seconds": copied["seconds"] + read["seconds"], "cp_seconds": copied["seconds"]}}
    results["import"] = watched([sys.executable, "-c", CONVERT, "import", str(source), str(imported)])
    settle(imported)
    results["export"] = watched([sys.executable, "-c", CONVERT, "export", str(imported), str(exported)])
    shutil.rmtree(imported)
    names = sorted(path.name for path in source.iterdir())
    same = names == sorted(path.name for path in exported.iterdir()) and all(
        filecmp.cmp(source / name, exported / name, shallow=False) for name in names
    )
    shutil.rmtree(exported)
    if not same:
        raise SystemExit("the exported folder differs from the source")
    return results


def main(rounds: int = 1, model: str = "mono_internvl_2b", folder: Path | None = None, out: Path | None = None) -> dict[str, Any]:
    """Measures copy, import and export in turn.

    Args:
        rounds: how often; the median counts.
        model: a released size.
        folder: where the temporary folder is made.
        out: a JSON file for the result.
    """
    config = named_config(model)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        work = Path(place)
        random_model(work / "source", config)
        size = sum(path.stat().st_size for path in (work / "source").iterdir())
        seen = [round_of(work, work / "source") for _ in range(rounds)]

    def median(step: str, key: str) -> float:
        return float(np.median([r[step][key] for r in seen]))

    result: dict[str, Any] = {"model": model, "bytes": size, "rounds": rounds, "copy_seconds": median("copy", "seconds")}
    for step in ("import", "export"):
        ratio = float(np.median([r[step]["seconds"] / r["copy"]["seconds"] for r in seen]))
        result[step] = {"ratio_to_copy": ratio} | {key: median(step, key) for key in ("seconds", "rss_anon_gb", "rss_gb")}
        shown = result[step]
        print(f"{step}  {ratio:.2f} x copying and reading back   RssAnon {shown['rss_anon_gb']:.2f} GB   RSS {shown['rss_gb']:.2f} GB")
    result |= {"identical": True, "cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    tyro.cli(main)
