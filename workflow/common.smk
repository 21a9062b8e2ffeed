"""The plan, and the functions by which rules ask it."""

import os
from functools import wraps
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.io import IOFile
from snakemake.logging import logger
from snakemake.settings.types import DeploymentMethod

from plait.config import Plan, load
from plait.config.asking import ASKED, Asking
from plait.config.batches import Batches
from plait.config.jobs import link_array_log
from plait.config.paths import plan_file
from plait.errors import PlaitError


class Refusal(WorkflowError):
    """A mistake that its sentence explains: Snakemake finds no traceback to print below it."""

    __traceback__ = None


def in_snakemakes_frame(function):
    """Show a mistake in config/ or in a target as Snakemake shows its own."""

    @wraps(function)
    def framed(*args, **more):
        try:
            return function(*args, **more)
        except PlaitError as error:
            raise Refusal(str(error)) from None

    return framed


# `--config plan=NAME` takes config/plans/NAME.yaml in place of the default plan.
configfile: in_snakemakes_frame(plan_file)(config.get("plan"))


onstart:
    # By its ration of starts, of 100 a second if none is asked for, Snakemake looks at all open jobs once more a
    # second after each look: ever more often. A ration that holds nothing back is none.
    ration = workflow.scheduler.job_rate_limiter
    if ration and ration.max_jobs >= 100 * ration.timespan:
        workflow.scheduler.job_rate_limiter = None


def made(kind, wildcards):
    """The artifact that a job makes."""
    return kind.read(kind.PATTERN.format(**dict(wildcards.items())))


def brought(found):
    """Files from afar, and what was checked of them; a job asks the hub first where they are not locked yet."""
    for tree in [one for one in found if isinstance(one, layout.HubTree)]:
        if tree not in waiting:
            waiting.add(tree)
            logger.info(f"{tree.key} is not locked yet: a job asks the hub first.")
        checkpoints.lock.get(repo=tree.repo, revision=tree.revision)
    return [ancient(str(one)) for one in found] + [one.manifest for one in found]


@in_snakemakes_frame
def from_afar(wildcards):
    """Every file that config/ takes from the hub or from URLs."""
    found = {where: plan.fetched(where) for where in plan.fetchables()}
    files_of_all = brought([one for several in found.values() for one in several])
    for where in [where for where in found if where not in waiting]:
        waiting.add(where)
        logger.info(plan.to_fetch(where))
    return files_of_all


# A folder's manifest stands for it where thousands of jobs, or one of thousands of inputs, would name both.
FOLDERS_OF_MANY = {
    (layout.Chat, layout.Raw),
    (layout.Indexed, layout.Tokenizer),
    (layout.Analysis, layout.Indexed),
}


def inputs(kind, *, guarded=True):
    """The artifacts that one of this kind is made from, by name, and their manifests.

    Only the manifests count as changed: folders are ancient, so touching or cloning plans nothing.
    The folder of an iteration is no output of its rule, and so no input: its manifest stands for it. Batches
    stand for shards, but for a single shard: that is made from single ones.
    What makes the artifact itself looks at what stands there (guarded), and waits for its parts, if it has any.
    """

    def folder(one):
        stand = (layout.Iteration, layout.Batch)
        if isinstance(one, stand) or (kind, type(one)) in FOLDERS_OF_MANY:
            return one.manifest
        return ancient(str(one))

    @in_snakemakes_frame
    def find(wildcards):
        artifact = made(kind, wildcards)
        if guarded and plan.left_alone(artifact, workflow.dag_settings):
            return {}
        found = plan.inputs(artifact)
        if kind is layout.Export:
            plan.check_kept(artifact, workflow.dag_settings)
            asking.add(artifact)
        if kind is layout.Raw and plan.to_supply(artifact) not in {"", *waiting}:
            waiting.add(plan.to_supply(artifact))
            logger.info(f"You must supply {plan.to_supply(artifact)}.")
        if guarded:
            for one in (
                artifact.shards if isinstance(artifact, layout.Batch) else [artifact]
            ):
                files.refuse_foreign(one)
        found.pop("files", None)
        if kind is layout.Iteration and not plan.adopted(*found["analysis"]):
            # Its analysis changes with each shard, and waits for all of them, of which there may be thousands.
            found = {"analysis": found["analysis"]}
            workflow.dag.forcefiles.update(
                batches.gone(artifact, workflow.dag_settings)
            )
        if kind is not layout.Indexed:
            found = {name: batches.cut(several) for name, several in found.items()}
        needed = [one for several in found.values() for one in several]
        for one in needed:
            plan.adopted(one)
        if guarded:
            record = lambda path: workflow.persistence.metadata(IOFile(path))
            forced = batches.to_force(artifact, needed, record)
            workflow.dag.forcefiles.update(forced)
        manifests = [one.manifest for one in needed if folder(one) != one.manifest]
        folders = {
            name: alone([folder(one) for one in several])
            for name, several in found.items()
        }
        if guarded and kind in layout.SPLIT:
            recorded = workflow.persistence.input(IOFile(artifact.manifest))
            folders["parts"] = plan.conversion_parts(artifact, recorded)
        return folders | {"manifests": alone(manifests)}

    return find


def fetched(kind):
    """The files from afar that an artifact is made from: apart, for they may wait for the hub."""

    @in_snakemakes_frame
    def find(wildcards):
        artifact = made(kind, wildcards)
        return [] if plan.adopted(artifact) else brought(plan.inputs(artifact)["files"])

    return find


def settings(kind, stage=""):
    """The config slice and stage version that decide an artifact's content."""
    return in_snakemakes_frame(
        lambda wildcards: plan.settings_text(made(kind, wildcards), stage)
    )


@in_snakemakes_frame
def start(wildcards):
    """What a checkpoint is trained from: the one before it, another run's proven one, or the proven model."""
    iteration = made(layout.Iteration, wildcards)
    if plan.left_alone(iteration, workflow.dag_settings):
        return {}
    asking.add(iteration)
    before = plan.start(iteration, plan.schedule_as_known(iteration.run))
    if isinstance(before, layout.Iteration):
        proven = {"proof": before.proof} if before.run != iteration.run else {}
        return {"start": before.manifest} | proven
    return {
        "start": before.manifest,
        "sharded": ancient(str(before)),
        "proof": before.proof,
    }


@in_snakemakes_frame
def legal_schedule(wildcards):
    """schedule.json, for an iteration that it saves; as soon as it is known, others are refused."""
    run, step = wildcards.run, int(wildcards.iteration)
    if plan.adopted(made(layout.Iteration, wildcards)):
        return []
    saved = layout.Run(run=run).schedule
    if plan.schedule(run) is None:
        if plan.schedule_as_known(run) is None and run not in waiting:
            waiting.add(run)
            logger.info(
                f"The length of run {run} follows from data that do not exist yet: any iteration is "
                f"accepted until {saved} is made, which then refuses those that are never saved."
            )
        checkpoints.schedule.get(run=run)
    schedule = plan.schedule_as_known(run)
    if schedule is None:
        raise Refusal(
            f"{saved} was made with other settings than config/ has now: remove it, it is remade"
        )
    schedule.check(step, run=run)
    return saved


def export_of(wildcards):
    """The export by which a checkpoint is proven, whole and proven itself."""
    export = made(layout.Iteration, wildcards).export
    return {
        "export": ancient(str(export)),
        "manifest": export.manifest,
        "proof": export.proof,
    }


@in_snakemakes_frame
def processes(wildcards):
    """The processes of a proof, or of a run that trains: one core each here, one GPU each on a cluster."""
    if "iteration" in wildcards.keys():
        return plan.run(wildcards.run).world_size
    grid = wildcards if "tp" in wildcards.keys() else plan.sharded(wildcards.run)
    return max(2, int(grid.tp))


def asks(rule):
    """What a job of a rule asks a cluster for, by attempt; without a cluster nothing looks at it.

    What config/ leaves out is left out here, so that default-resources of a profile may say it.
    """

    def value(key):
        @in_snakemakes_frame
        def ask(wildcards, attempt):
            link_array_log(rule, wildcards)
            run = wildcards.run if rule == "train" else None
            return plan.asks(rule, run=run, attempt=attempt).get(key)

        return ask

    return {key: value(key) for key in plan.asked_for(rule)}


# How a run is started, what it tells, and what else this plan asks of the job: no change of it remakes anything.
around = in_snakemakes_frame(
    lambda wildcards: files.canonical(asking.around(made(layout.Iteration, wildcards)))
)

# How many processes tokenise the samples of a mixture; packed shards are counted by one, which reads no token.
tokenising = lambda wildcards, input: 2 if input.tokenizer else 1

# How many parts of a conversion its job joins; 0 where it was not split.
joined = lambda wildcards, input: len(input.get("parts", ()))

# The user's own files by size: an appended line makes a raw source again, touching it does not.
user_files = in_snakemakes_frame(
    lambda wildcards: files.canonical(plan.sizes(made(layout.Raw, wildcards)))
)

# A list of one as that one: for each list of a job Snakemake keeps a kilobyte, of thousands of jobs.
alone = lambda several: several[0] if len(several) == 1 else several

# Shards in few words: the names of thousands would fit no command line.
spanned = lambda name: lambda wildcards, input: layout.spans(
    os.path.dirname(path) if path.endswith(layout.MANIFEST) else path
    for path in listed(input.get(name, []))
)
listed = lambda found: [found] if isinstance(found, str) else found

# What a mixture's page quotes besides its sources; only ledgers count as changed.
quoted = in_snakemakes_frame(
    lambda wildcards: {
        name: paths if name == "ledgers" else ancient(paths)
        for name, paths in plan.quoted(
            made(layout.Analysis, wildcards), batches.cut
        ).items()
    }
)

# The export that the short form links to.
linked = in_snakemakes_frame(
    lambda wildcards: ancient(files.linkable(made(layout.Export, wildcards)))
)

# What no rule makes is refused with the names that rules know.
unmade = in_snakemakes_frame(lambda wildcards: layout.refuse_target(wildcards.unmade))

# Whether rules run in images, and in which; training starts its own on every node: Snakemake would put `srun`
# into one. Each is looked for when a job wants it.
contained = DeploymentMethod.APPTAINER in workflow.deployment_settings.deployment_method
image = lambda kind: in_snakemakes_frame(
    lambda wildcards: plan.image(kind) if contained else None
)
training_image = lambda wildcards: image("gpu")(wildcards) or ""
no_image = lambda wildcards: None

# What `snakemake --report` shows; captions lie where the rules look for them.
LOSS_CURVE = {
    "caption": "../report/loss.rst",
    "category": "1. Loss curves",
    "labels": {"run": "{run}"},
}
EXPORT_PROOF = {
    "caption": "../report/proof.rst",
    "category": "2. Proofs of exports",
    "labels": {"run": "{run}", "iteration": "{step}"},
}
TOKENS_PAGE = {
    "caption": "../report/tokens.rst",
    "category": "3. Tokens and mixtures",
    "patterns": ["{page}.html"],
    "labels": {"mixture": "{mixture}"},
}

waiting = set()
plan = in_snakemakes_frame(
    lambda: Plan(load({key: config[key] for key in config if key != "plan"}))
)()
batches = Batches(plan, lambda: workflow.dag_settings.targets)
asking = Asking(
    plan,
    say=logger.info,
    tells=os.environ if workflow.is_main_process else {},
)
if not workflow.is_main_process:
    asking.take(os.environ.get(ASKED, "{}"))
if contained:
    os.environ.update(in_snakemakes_frame(plan.containers)())
