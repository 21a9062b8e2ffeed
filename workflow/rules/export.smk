"""Training checkpoint -> proven Hugging Face model."""


rule export:
    """Convert a training checkpoint back; it appears only if its proof holds."""
    input:
        unpack(inputs(layout.Export)),
    output:
        folder=directory(layout.Export.PATTERN),
        manifest=layout.pattern(layout.Export, layout.MANIFEST),
        proof=report(layout.proof_pattern(layout.Export), **EXPORT_PROOF),
    log:
        "data/logs/export/{run}/model_iter_{step}.log",
    benchmark:
        "data/benchmarks/export/{run}/model_iter_{step}.tsv"
    threads: processes
    resources:
        **asks("export"),
    params:
        settings=settings(layout.Export),
    shell:
        "plait export {input.hf} $(dirname {input.iteration}) {output.folder} --settings {params.settings:q} > {log} 2>&1"


localrules:
    short,


rule short:
    """ckpts/... is short for data/ckpts/..."""
    input:
        linked,
    output:
        directory(layout.Export.PATTERN.removeprefix("data/")),
    log:
        "data/logs/short/{run}/model_iter_{step}.log",
    benchmark:
        "data/benchmarks/short/{run}/model_iter_{step}.tsv"
    container:
        no_image
    resources:
        **asks("short"),
    shell:
        "ln -srfnT {input} {output} > {log} 2>&1"


rule generate:
    """Ask an export the prompts of its run."""
    input:
        unpack(inputs(layout.Generated)),
    output:
        layout.Generated.PATTERN,
    log:
        "data/logs/generate/{run}/model_iter_{step}.log",
    benchmark:
        "data/benchmarks/generate/{run}/model_iter_{step}.tsv"
    resources:
        **asks("generate"),
    params:
        settings=settings(layout.Generated),
    shell:
        "plait generate {input.export} {output} --settings {params.settings:q} > {log} 2>&1"
