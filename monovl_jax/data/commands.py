"""`monovl data ...`: parse, call, print. No logic; loads nothing before a command runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

Positional = tyro.conf.Positional


def data_prepare(
    source: Positional[Path],
    out: Positional[Path],
    *,
    model: Path | None = None,
    tokenizer: Path | None = None,
    template: str | None = None,
    root: Path | None = None,
    workers: int = os.cpu_count() or 1,
    samples_per_shard: int = 2048,
    verify_images: bool = False,
    trust_control_tokens: bool = False,
    beam: str | None = None,
) -> int:
    """JSONL and pictures to shards that training reads at random, once for all stages (docs/data.md). Rerun to go on.

    Args:
        source: META.json, or one JSONL file.
        out: a new folder; `monovl train --data OUT` reads it.
        model: the folder whose tokenizer and chat template are taken.
        tokenizer: a folder with tokenizer.json or tokenizer.model, instead of the model's.
        template: name of a chat template, instead of the model's.
        root: of one JSONL file, the folder or tar shards of its pictures; the file's folder by default.
        workers: processes; they change nothing in the result.
        samples_per_shard: lines of the JSONL file that make one shard.
        verify_images: decode every picture, not only its header, and leave broken ones out.
        trust_control_tokens: a control token in a text (`<|im_end|>`) is one, as upstream has it; text by default.
        beam: instead of workers, run on Apache Beam with these pipeline options ("" for this machine).
    """
    from monovl_jax.data.meta import MetaError
    from monovl_jax.data.prepare import find_sets, prepare, settings_of

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    try:
        run = None
        if beam is not None:
            from monovl_jax.data.beam import beam_runner

            run = beam_runner(beam)
        settings = settings_of(model, tokenizer, template, verify_images, trust_control_tokens)
        sizes: Any = dict(workers=workers, samples_per_shard=samples_per_shard)
        prepare(find_sets(source, root), out, settings, say=say, run=run, **sizes)
    except (MetaError, ValueError, OSError) as error:
        print(f"monovl data prepare: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("monovl data prepare: stopped; the same command goes on", file=sys.stderr)
        return 130
    print(out)
    return 0


def data_verify(folder: Positional[Path]) -> int:
    """Compare every byte of prepared data with its manifest. Exit code 1 when it is not what was written.

    Args:
        folder: that `monovl data prepare` made.
    """
    from monovl_jax.data.meta import MetaError
    from monovl_jax.data.prepare import verify

    try:
        verify(folder)
    except (MetaError, OSError) as error:
        print(f"monovl data verify: {error}", file=sys.stderr)
        return 1
    return 0


def data(
    command: Annotated[int, tyro.conf.subcommand("prepare", constructor=data_prepare)]
    | Annotated[int, tyro.conf.subcommand("verify", constructor=data_verify)],
) -> int:
    """Data sets too large to index on every start (docs/data.md)."""
    return command
