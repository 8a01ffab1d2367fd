"""`data.prepare` on Apache Beam: the same jobs, the same shards to the byte, on whatever runner the options name.

    monovl data prepare META.json OUT --model DIR --beam "--runner=DataflowRunner --project=... --region=..."

The launcher plans the shards and writes the manifest when all are there; a worker makes one shard at a time by `prepare_shard`. Workers
read and write files, so OUT, the annotations, the pictures and the tokenizer must be at the same paths on every worker (NFS, Filestore,
gcsfuse). A shard that Beam makes twice is the same file twice. Needs the extra `beam`; this machine is the DirectRunner.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence

from monovl_jax.data.meta import MetaError
from monovl_jax.data.prepare import Report, RunJobs, ShardJob, is_done, prepare_shard, read_report


def beam_runner(options: str = "") -> RunJobs:
    """Runs jobs as a pipeline with these options, written as on a command line. Raises MetaError without Beam or for a bad option."""
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise MetaError(f"--beam needs Apache Beam, which cannot be loaded ({error}); pip install 'monovl_jax[beam]'") from None

    def run(jobs: Sequence[ShardJob]) -> Iterable[Report]:
        if not jobs:
            return
        with apache_beam.Pipeline(options=PipelineOptions(shlex.split(options))) as pipeline:
            _ = pipeline | "jobs" >> apache_beam.Create(jobs) | apache_beam.Reshuffle() | "prepare" >> apache_beam.Map(prepare_shard)
        for job in jobs:
            if not is_done(job):
                raise MetaError(f"a worker wrote shard {job.number} elsewhere; {job.folder} must be the same folder on every machine")
            yield read_report(job)["report"]

    return run
