"""From the sources of a stage to the batches that the training loop asks for."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import jax

from monovl_jax.config import VisionConfig
from monovl_jax.data.packing import PackSpec
from monovl_jax.data.pipeline import Batch, Part, Pipeline
from monovl_jax.training.stages import Stage

TEXT_FIELDS = ("tokens", "positions", "segment_ids", "targets", "loss_weights")
"""What a batch of text alone needs."""

MakeParts = Callable[[Stage, Mapping[str, float], int, int], Sequence[Part]]
"""(stage, its mixture or text mixture, token slots of a row, tile slots of a row) -> the sources with their shares."""


class Feed:
    """The data of every stage: packed rows with pictures, and where the stage asks for it, rows of text beside them.

    window, threads: see `data.pipeline.Pipeline`; threads change no batch. share: (index, count), which part of each batch this process
    makes (`parallel.mesh.row_share`); by default each process another one. The pipelines of a stage are made once. Raises what `parts` and
    `Pipeline` raise.
    """

    def __init__(
        self,
        vision: VisionConfig,
        image_context_id: int,
        parts: MakeParts,
        *,
        window: int = 2048,
        threads: int = 1,
        share: tuple[int, int] | None = None,
    ):
        self._index, self._count = share or (jax.process_index(), jax.process_count())
        self._vision, self._context, self._parts = vision, image_context_id, parts
        self._window, self._threads = window, threads
        self._made: dict[str, tuple[Pipeline, Pipeline | None]] = {}

    def _pipeline(self, stage: Stage, mixture: Mapping[str, float], tokens: int, tiles: int, rows: int) -> Pipeline:
        vision = self._vision
        spec = PackSpec(tokens, tiles, vision.tokens_per_tile, vision.tile_size, self._context, loss_weighting=stage.loss_weighting)
        return Pipeline(
            self._parts(stage, mixture, tokens, tiles),
            spec,
            rows,
            stage.seed,
            process_index=self._index,
            process_count=self._count,
            window=self._window,
            threads=self._threads,
        )

    def pipelines(self, stage: Stage) -> tuple[Pipeline, Pipeline | None]:
        """(rows with pictures, or of text in a stage of text alone; the rows of text beside them or None)."""
        if stage.name not in self._made:
            main = self._pipeline(stage, stage.mixture, stage.sequence_length, stage.tiles_per_row, stage.batch_size)
            text = self._pipeline(stage, stage.text_mixture, stage.text_length, 0, stage.text_rows) if stage.text_rows else None
            self._made[stage.name] = main, text
        return self._made[stage.name]

    def state(self, stage: Stage, position: int) -> list[Any]:
        """`training.loop.DataState`: where each pipeline of the stage is before batch number `position`, in JSON values."""
        return [pipeline.state(position) for pipeline in self.pipelines(stage) if pipeline is not None]

    def restore(self, stage: Stage, state: Any) -> bool:
        """Goes on where `state` says; False when it is not of these data."""
        pipelines = [pipeline for pipeline in self.pipelines(stage) if pipeline is not None]
        if not isinstance(state, list) or len(state) != len(pipelines):
            return False
        return all(pipeline.restore(part) for pipeline, part in zip(pipelines, state, strict=True))

    def __call__(self, stage: Stage, position: int) -> Generator[tuple[Batch, ...], None, None]:
        """Endless batches number `position`, position + 1, ...: `training.loop.MakeBatches`."""
        main, text = self.pipelines(stage)

        def without_tiles(batch: Batch) -> Batch:
            return {key: batch[key] for key in TEXT_FIELDS}

        with main.batches(position) as first:
            if text is None:
                for batch in first:
                    yield (batch if stage.tiles_per_row else without_tiles(batch),)
            else:
                with text.batches(position) as second:
                    for batch, words in zip(first, second, strict=True):
                        yield (batch if stage.tiles_per_row else without_tiles(batch)), without_tiles(words)
