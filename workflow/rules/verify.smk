"""Proofs: a model artifact computes what its Hugging Face source computes."""


rule verify_megatron:
    """Compare the logits of a whole Megatron model with its source's."""
    input:
        unpack(inputs(layout.Megatron, guarded=False)),
        megatron=ancient(layout.Megatron.PATTERN),
        manifest=layout.pattern(layout.Megatron, layout.MANIFEST),
    output:
        layout.proof_pattern(layout.Megatron),
    log:
        "data/logs/verify_megatron/{model}.log",
    benchmark:
        "data/benchmarks/verify_megatron/{model}.tsv"
    threads: 2
    resources:
        **asks("verify_megatron"),
    params:
        settings=settings(layout.Megatron, "verify"),
    shell:
        "plait verify {input.hf} {input.megatron} {output} --settings {params.settings:q} > {log} 2>&1"


rule verify_sharded:
    """Compare the logits of a sharded model, computed on its grid, with its source's."""
    input:
        unpack(inputs(layout.Megatron, guarded=False)),
        sharded=ancient(layout.Sharded.PATTERN),
        manifest=layout.pattern(layout.Sharded, layout.MANIFEST),
    output:
        layout.proof_pattern(layout.Sharded),
    log:
        "data/logs/verify_sharded/{model}-tp{tp}-pp{pp}.log",
    benchmark:
        "data/benchmarks/verify_sharded/{model}-tp{tp}-pp{pp}.tsv"
    threads: processes
    resources:
        **asks("verify_sharded"),
    params:
        settings=settings(layout.Sharded, "verify"),
    shell:
        "plait verify {input.hf} {input.sharded} {output} --settings {params.settings:q} > {log} 2>&1"


rule verify_iteration:
    """Prove a training checkpoint by the export that was proven against it."""
    input:
        unpack(export_of),
        iteration=layout.pattern(layout.Iteration, layout.MANIFEST),
    output:
        layout.proof_pattern(layout.Iteration),
    log:
        "data/logs/verify_iteration/{run}/iter_{iteration}.log",
    benchmark:
        "data/benchmarks/verify_iteration/{run}/iter_{iteration}.tsv"
    resources:
        **asks("verify_iteration"),
    params:
        settings=settings(layout.Iteration, "verify"),
    shell:
        "plait verify {input.export} $(dirname {input.iteration}) {output} > {log} 2>&1"
