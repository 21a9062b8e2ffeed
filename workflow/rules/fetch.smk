"""Files of the hub and of URLs: what they are, then each by a job of its own."""


localrules:
    lock,
    prefetch,


# Its output is a record beside the files; what planning reads is config/hub.lock.json, to which it adds.
checkpoint lock:
    """Ask the hub which commit a revision is, and what its files are."""
    output:
        layout.HubTree.PATTERN,
    log:
        "data/logs/lock/{repo}/{revision}.log",
    benchmark:
        "data/benchmarks/lock/{repo}/{revision}.tsv"
    container:
        image("io")
    resources:
        **asks("lock"),
    shell:
        "plait lock {output:q} > {log:q} 2>&1"


# What has come lies beside the output in a hidden file, which no failure takes away.
rule fetch:
    """Fetch one file, or go on with it; it appears when its digest is right."""
    input:
        unpack(inputs(layout.HubFile)),
    output:
        file=layout.HubFile.PATTERN,
        checked=layout.HubFile.CHECKED,
    log:
        "data/logs/fetch/{repo}/{commit}/{file}.log",
    benchmark:
        "data/benchmarks/fetch/{repo}/{commit}/{file}.tsv"
    container:
        image("io")
    resources:
        **asks("fetch"),
    params:
        settings=settings(layout.HubFile),
    shell:
        "plait fetch {output.file:q} --settings {params.settings:q} > {log:q} 2>&1"


rule prefetch:
    """Every file that config/ takes from afar, for a machine that has a network."""
    input:
        from_afar,
