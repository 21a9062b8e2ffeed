"""Pictures for `snakemake --report`."""


localrules:
    report,


rule report:
    """Draw a run's losses."""
    input:
        unpack(inputs(layout.LossCurve)),
    output:
        report(layout.LossCurve.PATTERN, **LOSS_CURVE),
    log:
        "data/logs/report/{run}.log",
    benchmark:
        "data/benchmarks/report/{run}.tsv"
    container:
        image("io")
    resources:
        **asks("report"),
    params:
        metrics=layout.pattern(layout.Run, layout.METRICS),
        settings=settings(layout.LossCurve),
    shell:
        "plait report {params.metrics} {output} --settings {params.settings:q} > {log} 2>&1"
