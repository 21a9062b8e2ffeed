"""Hugging Face model -> Megatron model -> Megatron model cut for a grid."""


rule model:
    """Make, link or build a Hugging Face model."""
    input:
        unpack(inputs(layout.HfModel)),
        files=fetched(layout.HfModel),
    output:
        folder=directory(layout.HfModel.PATTERN),
        manifest=layout.pattern(layout.HfModel, layout.MANIFEST),
    log:
        "data/logs/model/{model}.log",
    benchmark:
        "data/benchmarks/model/{model}.tsv"
    container:
        image("io")
    resources:
        **asks("model"),
    params:
        settings=settings(layout.HfModel),
    shell:
        "plait build {input.parts} {output.folder} --settings {params.settings:q} > {log} 2>&1"


rule convert:
    """Convert a Hugging Face model to Megatron's names and shapes."""
    input:
        unpack(inputs(layout.Megatron)),
    output:
        folder=directory(layout.Megatron.PATTERN),
        manifest=layout.pattern(layout.Megatron, layout.MANIFEST),
    log:
        "data/logs/convert/{model}.log",
    benchmark:
        "data/benchmarks/convert/{model}.tsv"
    resources:
        **asks("convert"),
        joined=joined,
    params:
        settings=settings(layout.Megatron),
    shell:
        "plait convert {input.hf} {output.folder} --settings {params.settings:q} --join {resources.joined} > {log} 2>&1"


rule convert_part:
    """Convert a part of a Hugging Face model; `convert` joins the parts."""
    input:
        unpack(inputs(layout.Megatron, guarded=False)),
    output:
        temp(layout.part_pattern(layout.Megatron)),
    log:
        "data/logs/convert_part/{model}/{part}-of-{parts}.log",
    benchmark:
        "data/benchmarks/convert_part/{model}/{part}-of-{parts}.tsv"
    resources:
        **asks("convert_part"),
    params:
        target=layout.Megatron.PATTERN,
        settings=settings(layout.Megatron),
    shell:
        "plait convert {input.hf} {params.target} --part {wildcards.part}/{wildcards.parts} --settings {params.settings:q} > {log} 2>&1"


rule shard:
    """Cut a proven Megatron model for a tensor x pipeline grid."""
    input:
        unpack(inputs(layout.Sharded)),
        proof=layout.proof_pattern(layout.Megatron),
    output:
        folder=directory(layout.Sharded.PATTERN),
        manifest=layout.pattern(layout.Sharded, layout.MANIFEST),
    log:
        "data/logs/shard/{model}-tp{tp}-pp{pp}.log",
    benchmark:
        "data/benchmarks/shard/{model}-tp{tp}-pp{pp}.tsv"
    resources:
        **asks("shard"),
        joined=joined,
    params:
        settings=settings(layout.Sharded),
    shell:
        "plait shard {input.megatron} {output.folder} --settings {params.settings:q} --join {resources.joined} > {log} 2>&1"


rule shard_part:
    """Cut a part of a proven Megatron model; `shard` joins the parts."""
    input:
        unpack(inputs(layout.Sharded, guarded=False)),
        proof=layout.proof_pattern(layout.Megatron),
    output:
        temp(layout.part_pattern(layout.Sharded)),
    log:
        "data/logs/shard_part/{model}-tp{tp}-pp{pp}/{part}-of-{parts}.log",
    benchmark:
        "data/benchmarks/shard_part/{model}-tp{tp}-pp{pp}/{part}-of-{parts}.tsv"
    resources:
        **asks("shard_part"),
    params:
        target=layout.Sharded.PATTERN,
        settings=settings(layout.Sharded),
    shell:
        "plait shard {input.megatron} {params.target} --part {wildcards.part}/{wildcards.parts} --settings {params.settings:q} > {log} 2>&1"
