"""`monovl plan`: parse, call, print. No logic; loads nothing before the command runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

Positional = tyro.conf.Positional


def plan(
    recipe: Positional[str],
    *,
    topology: str,
    init: Path | None = None,
    stages: tuple[str, ...] = (),
    batch_size: int | None = None,
    accumulation: int | None = None,
    sequence_length: int | None = None,
    remat: Literal["none", "save_projections", "full"] | None = None,
    mesh_data: Annotated[int | None, tyro.conf.arg(name="mesh.data")] = None,
    mesh_fsdp: Annotated[int | None, tyro.conf.arg(name="mesh.fsdp")] = None,
    mesh_tensor: Annotated[int | None, tyro.conf.arg(name="mesh.tensor")] = None,
    sweep: bool = False,
    serve: bool = False,
    new_tokens: int = 256,
    cache: bool = True,
    out: Path | None = None,
    picture: Path | None = None,
) -> int:
    """Compile a recipe for a TPU pod on a machine without one: does it fit, what does it cost (docs/planning.md).

    Exit code 1 when a stage does not fit.

    Args:
        recipe: evip, evip_plus_plus, or FILE.py:NAME, as `monovl train` takes it.
        topology: v5e:4x4, v5p:8x8x8, v6e:16x16 or another that libtpu knows.
        init: for recipes that work on a model you bring, the folder of its weights; only its config is read.
        stages: only these stages of the recipe.
        batch_size: rows of a step, instead of the recipe's.
        accumulation: micro-batches a step; the fewest that a formula takes to fit by default.
        sequence_length: tokens of a row, instead of the recipe's.
        remat: what the backward pass computes again; by default save_projections or full, the faster that fits by a formula.
        mesh_data: as of `monovl train`; without any of the three, parameters lie in up to 16 pieces.
        mesh_fsdp: devices among which rows and parameters are divided.
        mesh_tensor: devices among which heads, hidden units and vocabulary are divided.
        sweep: rank meshes and remat policies by formula, and compile the best three of each stage. What is given is not varied.
        serve: plan prefill and decode of a model (mono_internvl_2b, mono_internvl_1_5_2b or a folder) instead of a recipe's stages:
            batch_size conversations a chip (8), sequence_length tokens of a prompt (2048).
        new_tokens: of each answer, with serve.
        cache: keep what the compiler said under XDG_CACHE_HOME (~/.cache), and take what is there.
        out: a JSON file for the plan.
        picture: a PNG file for bars of a chip's memory, or of a sweep's step times.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from monovl_jax.planning import plan as planning
    from monovl_jax.planning import report
    from monovl_jax.planning import serve as serving

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def told(found: Iterable[Any], lines: Callable[..., list[str]], write: Callable[..., None]) -> list[Any]:
        """All that is found, printed and written stage by stage as it comes."""
        made = []
        for one in found:
            made.append(one)
            print("\n".join(lines(one)), flush=True)
            if out is not None:
                write(out, recipe, topology, made)
        return made

    def answers() -> int:
        planning.check_outputs((out,))
        rows, prompt = 8 if batch_size is None else batch_size, 2048 if sequence_length is None else sequence_length
        model = serving.find_model(recipe)
        found = serving.serve(model, topology, rows=rows, prompt=prompt, new=new_tokens, cache=cache, say=say)
        print("\n".join(report.serve_lines(recipe, found)))
        if out is not None:
            report.write_serve(out, recipe, topology, found)
        return 0 if found.fits else 1

    title, mesh = f"{recipe} on {topology}", (mesh_data, mesh_fsdp, mesh_tensor)
    try:
        if serve:
            of_stages = {
                "--init": init, "--stages": stages, "--accumulation": accumulation, "--remat": remat, "--mesh.data": mesh_data,
                "--mesh.fsdp": mesh_fsdp, "--mesh.tensor": mesh_tensor, "--sweep": sweep, "--picture": picture,
            }  # fmt: skip
            if given := [flag for flag, value in of_stages.items() if value]:
                raise planning.PlanError(f"--serve plans a model on one chip, not training; leave out {', '.join(given)}")
            return answers()
        files = (out, picture)
        job = planning.prepare(recipe, init=init, stages=stages, batch_size=batch_size, sequence_length=sequence_length, outputs=files)
        how = {"mesh": mesh, "accumulation": accumulation, "remat": remat, "cache": cache, "say": say}
        if sweep:
            sweeps = told(planning.sweep(job, topology, **how), report.sweep_lines, report.write_sweep)
            if picture is not None:
                report.write_sweep_picture(picture, title, sweeps)
            fits = all(ranking.plans[0].fits for ranking in sweeps)
        else:
            plans = told(planning.plan(job, topology, **how), report.stage_lines, report.write_json)
            if picture is not None:
                report.write_picture(picture, title, plans)
            fits = all(stage.fits for stage in plans)
        print("\n".join(report.closing_lines()))
    except planning.EXPECTED_ERRORS as error:
        print(f"monovl plan: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("monovl plan: stopped", file=sys.stderr)
        return 130
    return 0 if fits else 1
