"""How long a run is, and its segments: each persistent checkpoint is trained from the one before."""


checkpoint schedule:
    """Iterations in all and between two checkpoints, as the data give them."""
    input:
        unpack(inputs(layout.Run)),
    output:
        f"{layout.Run.PATTERN}/schedule.json",
    log:
        "data/logs/schedule/{run}.log",
    benchmark:
        "data/benchmarks/schedule/{run}.tsv"
    container:
        image("io")
    resources:
        **asks("schedule"),
    params:
        settings=settings(layout.Run),
    shell:
        "plait schedule {input.analysis} {output} --settings {params.settings:q} > {log} 2>&1"


# The weights beside the manifest are undeclared: Snakemake would delete them when a job fails.
rule train:
    """Train up to one persistent checkpoint."""
    input:
        unpack(inputs(layout.Iteration)),
        unpack(start),
        schedule=legal_schedule,
    output:
        layout.pattern(layout.Iteration, layout.MANIFEST),
    log:
        "data/logs/train/{run}/iter_{iteration}.log",
    benchmark:
        "data/benchmarks/train/{run}/iter_{iteration}.tsv"
    container:
        no_image
    threads: processes
    resources:
        **asks("train"),
        around=around,
        image=training_image,
    params:
        settings=settings(layout.Iteration),
    shell:
        "plait train $(dirname {input.start}) {input.analysis} {input.schedule} $(dirname {output}) --settings {params.settings:q} --around {resources.around:q} --image={resources.image:q} > {log} 2>&1"
