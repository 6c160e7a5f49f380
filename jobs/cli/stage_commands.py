"""Distil a vanilla multimodal LLM into one with few vision tokens, from a cache of its outputs.

data makes the demo's images; plan says what a cache takes; build runs the teacher once; verify and
inspect look at a cache, gc removes leftovers; subset, export, merge and extend make caches from
caches; train makes a student from it (recipe prints the paper's settings); evaluate and report
compare students; submit sends a stage to a Ray cluster; demo does it all in miniature.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jobs.cli.cache_commands import Gc, Inspect, Verify
from jobs.cli.derive_commands import Export, Extend, Merge, Subset
from jobs.cli.extras import require_extra
from jobs.cli.output import echo, warn
from jobs.cluster.options import RayOptions
from pipeline.config.build import BuildConfig
from pipeline.config.extend import ExtendConfig
from pipeline.config.plan import PlanConfig
from pipeline.config.stages import EvaluateConfig, TrainConfig
from pipeline.demo.config import DigitsConfig

Command = Callable[[], int]
Stage = Literal["build", "extend", "train", "evaluate"]
RecipeName = Literal["paper-phase-one", "paper-phase-two", "paper-epic"]

CONFIG_CLASSES: dict[str, type] = {
    "plan": PlanConfig,
    "build": BuildConfig,
    "extend": ExtendConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
}


@dataclass(frozen=True, kw_only=True)
class Data:
    """Make a data set that needs no network: grids of scikit-learn's handwritten digits.

    Example: emkd data digits --out data
    """

    name: tyro.conf.Positional[Literal["digits"]]
    config: DigitsConfig

    def __call__(self) -> int:
        """Write the images and the JSON files."""
        require_extra("demo")
        from jobs.cluster.progress import ProgressBars
        from pipeline.demo.digits import write_digits

        with ProgressBars() as bars:
            out = write_digits(self.config, bars.update)
        echo(f"{out}: train.json, heldout.json")
        return 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Estimate the size of each tier of a cache; with --pilot, measure size and loss.

    Example: emkd plan --samples 100000 --vision-tokens 576
    """

    config: PlanConfig = PlanConfig()
    json: bool = False
    """Print the report as JSON."""

    def __call__(self) -> int:
        """Print the report."""
        if self.config.pilot:
            from jobs.cluster.progress import ProgressBars
            from pipeline.fidelity.pilot import run_pilot
            from pipeline.fidelity.recommend import render_pilot

            with ProgressBars() as bars:
                report = run_pilot(self.config, bars.update)
            said, plain = render_pilot(report), dataclasses.asdict(report)
        else:
            from pipeline.fidelity.sizes import plan, render_plan

            report = plan(self.config)
            said, plain = render_plan(report), dataclasses.asdict(report)
        echo(json.dumps(plain, indent=1) if self.json else said)
        return 0


@dataclass(frozen=True, kw_only=True)
class Build:
    """Run the teacher once over a source and write a cache; run again to resume.

    Example: emkd build --source train.json --teacher llava-hf/llava-1.5-7b-hf --out cache
    """

    config: BuildConfig
    run: RayOptions = RayOptions()

    def __call__(self) -> int:
        """Exit code 4 if --require-quality is missed."""
        from jobs.stages.build import run_build
        from pipeline.fidelity.cache_quality import (
            is_unknown,
            render_quality,
            summarise,
            warning_text,
        )

        seal = run_build(self.config, self.run)
        megabytes = seal.num_bytes / 1e6
        echo(
            f"{self.config.out}: {seal.num_samples} samples in {len(seal.shards)} shards, "
            f"{megabytes:.1f} MB, fingerprint {seal.fingerprint[:12]}"
        )
        for rejected in seal.rejected:
            echo(f"  rejected {rejected.source_id}: {rejected.reason}")
        quality = summarise(seal)
        if quality is not None:
            echo(render_quality(quality, num_shards=1))
            warn(warning_text(quality, self.config.out))
        elif is_unknown(seal):
            warn(
                f"{self.config.out}: the losses of its records were not measured, and its shards "
                "are written; build into a new folder with --quality-samples to measure them"
            )
        missed = is_unknown(seal) if quality is None else bool(quality.faults)
        return 4 if missed and self.config.require_quality else 0


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a student from a sealed cache; no teacher is loaded. Run again to resume.

    Example: emkd train --cache cache --student llava-hf/llava-1.5-7b-hf --out runs/emkd
    """

    config: TrainConfig
    run: RayOptions = RayOptions()

    def __call__(self) -> int:
        """Train, then print the folder of the student."""
        from jobs.stages.train import run_train

        echo(f"student written to {run_train(self.config, self.run)}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Print the papers' settings for `emkd train --config`: EM-KD's two phases, or EPIC's.

    Example: emkd recipe paper-phase-one --cache cache --student student --out runs/one > one.json
    """

    name: tyro.conf.Positional[RecipeName]
    cache: str
    """Folder or URL of the sealed cache."""
    student: str
    """Folder or hub id of the student."""
    out: Path
    seed: int = 0

    def __call__(self) -> int:
        """Print the settings as JSON."""
        from jobs.cluster.paths import config_json
        from pipeline.config.recipes import paper_epic, paper_phase_one, paper_phase_two

        recipes = {
            "paper-phase-one": paper_phase_one,
            "paper-phase-two": paper_phase_two,
            "paper-epic": paper_epic,
        }
        config = recipes[self.name](
            cache=self.cache, student=self.student, out=self.out, seed=self.seed
        )
        echo(json.dumps(json.loads(config_json(config)), indent=1))
        return 0


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Generate answers and score them; run again to resume.

    Example: emkd evaluate --model runs/emkd/final --source heldout.json --out runs/emkd/heldout
    """

    config: EvaluateConfig
    run: RayOptions = RayOptions(ray=False)

    def __call__(self) -> int:
        """Evaluate, and print the scores."""
        from jobs.stages.evaluate import run_evaluate

        echo(json.dumps(run_evaluate(self.config, self.run), indent=1))
        return 0


@dataclass(frozen=True, kw_only=True)
class Report:
    """Compare runs in one self-contained HTML page.

    Example: emkd report runs/emkd runs/supervised --out report.html
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    out: Path = Path("report.html")

    def __call__(self) -> int:
        """Write the page."""
        require_extra("report")
        from pipeline.config.stages import ReportConfig
        from pipeline.report.report import write_report

        for line in write_report(ReportConfig(runs=self.runs, out=self.out)):
            echo(line)
        echo(f"report written to {self.out}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Submit:
    """Send a stage to a Ray cluster; the flags of the stage follow `--`.

    Example: emkd submit build --address http://head:8265 -- --source a.json --teacher T --out c
    """

    stage: tyro.conf.Positional[Stage]
    address: str | None = None
    """The cluster's dashboard (job server); default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or
    http://127.0.0.1:8265."""
    working_dir: Path | None = None
    """Folder of code to upload; default: none, emkd is installed on the cluster."""
    driver_cpus: float = 0.0
    """CPUs that the job's driver reserves; 0 lets it run on a busy head node."""
    stop_wait_s: int = 20
    """Seconds between SIGTERM and SIGKILL when the job is stopped."""
    wait: bool = True
    """Follow the log to the end."""
    payload: Annotated[Any, tyro.conf.Suppress] = None

    def with_stage(self, command: Any) -> "Submit":
        """The same submission with the parsed stage."""
        return dataclasses.replace(self, payload=command)

    def __call__(self) -> int:
        """Exit code 0 if the job succeeded, 1 if it failed, 5 if its end could not be learnt."""
        from jobs.cluster.paths import config_json
        from jobs.cluster.submit import entrypoint, run_flags, submit

        if self.payload is None:
            raise ValueError(f"emkd submit {self.stage} needs '--' and the flags of the stage")
        settings = config_json(self.payload.config)
        command = entrypoint(self.stage, settings, run_flags(self.payload.run))
        return submit(
            address=self.address,
            stage=self.stage,
            command=command,
            identity=json.loads(settings),
            working_dir=self.working_dir,
            driver_cpus=self.driver_cpus,
            stop_wait_s=self.stop_wait_s,
            wait=self.wait,
        )


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Teacher, cache, students, evaluation and report in miniature; run again to resume.

    Example: emkd demo --smoke
    """

    out: Path | None = None
    """Default: demo, or demo-epic."""
    seeds: tuple[int, ...] = (0, 1)
    """One run of each student per seed."""
    epic: bool = False
    """EPIC instead of EM-KD, scored at several budgets of vision tokens."""
    smoke: bool = False
    """Run every stage at a tiny size, in about a minute; the numbers mean nothing."""

    def __call__(self) -> int:
        """Run what is missing of the demo."""
        require_extra("demo")
        from jobs.demo.stages import FULL, SMOKE

        sizes = SMOKE if self.smoke else FULL
        if self.epic:
            from jobs.demo.epic import lines, run_demo_epic

            page = run_demo_epic(self.out or Path("demo-epic"), self.seeds, sizes)
            for line in lines(page.parent):
                echo(line)
        else:
            from jobs.demo.emkd import run_demo

            page = run_demo(self.out or Path("demo"), self.seeds, sizes)
        echo(f"open {page}")
        return 0


def defaults() -> dict[str, Any]:
    """A command for each name, with its required settings missing."""
    making = (Data, Plan, Build, Verify, Inspect, Gc, Subset, Export, Merge, Extend)
    using = (Train, Recipe, Evaluate, Report, Submit, Demo)
    return {kind.__name__.lower(): _required(kind) for kind in (*making, *using)}


def _required(cls: Any) -> Any:
    """An instance whose fields without a default are marked as missing, for tyro to ask for.

    Made without calling `cls`: a mark is none of the values that the fields may have.
    """
    template = object.__new__(cls)
    for field in dataclasses.fields(cls):
        value: Any = field.default
        if value is dataclasses.MISSING:
            nested = dataclasses.is_dataclass(field.type)
            value = _required(field.type) if nested else tyro.MISSING
        object.__setattr__(template, field.name, value)
    return template
