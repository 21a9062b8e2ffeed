"""Raw data -> chat records -> packed tokens -> mixture."""

# The words that an encoder remembers fill some 200 MB: in pages of 2 MB, where the system gives them, `plait index`
# takes 6 to 10 % less.
HUGE_PAGES = "GLIBC_TUNABLES=glibc.malloc.hugetlb=1"


rule raw:
    """Fetch, link or draw a raw source."""
    input:
        unpack(inputs(layout.Raw)),
        files=fetched(layout.Raw),
    output:
        folder=directory(layout.Raw.PATTERN),
        manifest=layout.pattern(layout.Raw, layout.MANIFEST),
    log:
        "data/logs/raw/{dataset}.log",
    benchmark:
        "data/benchmarks/raw/{dataset}.tsv"
    container:
        image("io")
    resources:
        **asks("raw"),
    params:
        settings=settings(layout.Raw),
        files=user_files,
    shell:
        "plait raw {output.folder} --settings {params.settings:q} > {log} 2>&1"


rule chat:
    """Make one shard of chat records with base64 pictures; count what is rejected."""
    input:
        unpack(inputs(layout.Chat)),
    output:
        shard=layout.Chat.PATTERN,
        rejects=layout.Chat.REJECTS,
        ledger=layout.Chat.LEDGER,
    log:
        "data/logs/chat/{dataset}/shard_{shard}.log",
    benchmark:
        "data/benchmarks/chat/{dataset}/shard_{shard}.tsv"
    resources:
        **asks("chat"),
    params:
        settings=settings(layout.Chat),
    shell:
        "plait chat $(dirname {input.raw}) {output.shard} --settings {params.settings:q} > {log} 2>&1"


rule chat_batch:
    """Make consecutive shards of chat records in one job (shards_per_job); those that stand are kept."""
    input:
        unpack(inputs(layout.ChatBatch)),
    output:
        layout.ChatBatch.PATTERN,
    log:
        "data/logs/chat/{dataset}/shards_{first}-{last}.log",
    benchmark:
        "data/benchmarks/chat/{dataset}/shards_{first}-{last}.tsv"
    resources:
        **asks("chat_batch"),
    params:
        settings=settings(layout.ChatBatch),
    shell:
        "plait chat {input.raw} {output} --settings {params.settings:q} > {log} 2>&1"


rule tokenizer:
    """Take a tokenizer, or add tokens to one."""
    input:
        unpack(inputs(layout.Tokenizer)),
    output:
        folder=directory(layout.Tokenizer.PATTERN),
        manifest=layout.pattern(layout.Tokenizer, layout.MANIFEST),
    log:
        "data/logs/tokenizer/{tokenizer}.log",
    benchmark:
        "data/benchmarks/tokenizer/{tokenizer}.tsv"
    resources:
        **asks("tokenizer"),
    params:
        settings=settings(layout.Tokenizer),
    shell:
        "plait tokenizer {input.base} {output.folder} --settings {params.settings:q} > {log} 2>&1"


rule index:
    """Tokenise chat records and pack them into one indexed shard."""
    input:
        unpack(inputs(layout.Indexed)),
    output:
        folder=directory(layout.Indexed.PATTERN),
        manifest=layout.pattern(layout.Indexed, layout.MANIFEST),
    log:
        "data/logs/index/{format}_{dataset}_pack{seq}/shard_{shard}.log",
    benchmark:
        "data/benchmarks/index/{format}_{dataset}_pack{seq}/shard_{shard}.tsv"
    resources:
        **asks("index"),
    params:
        settings=settings(layout.Indexed),
    shell:
        HUGE_PAGES
        + " plait index $(dirname {input.tokenizer}) {input.chats} {output.folder} --settings {params.settings:q} > {log} 2>&1"


rule index_batch:
    """Tokenise and pack consecutive shards in one job (shards_per_job); those that stand are kept."""
    input:
        unpack(inputs(layout.IndexedBatch)),
    output:
        layout.IndexedBatch.PATTERN,
    log:
        "data/logs/index/{format}_{dataset}_pack{seq}/shards_{first}-{last}.log",
    benchmark:
        "data/benchmarks/index/{format}_{dataset}_pack{seq}/shards_{first}-{last}.tsv"
    resources:
        **asks("index_batch"),
    params:
        settings=settings(layout.IndexedBatch),
        chats=spanned("chats"),
    shell:
        HUGE_PAGES
        + " plait index {input.tokenizer} {params.chats} {output} --settings {params.settings:q} > {log} 2>&1"


rule energon:
    """Write the shards of a dataset as webdataset tars, prepared for megatron-energon."""
    input:
        unpack(inputs(layout.Energon)),
    output:
        folder=directory(layout.Energon.PATTERN),
        manifest=layout.pattern(layout.Energon, layout.MANIFEST),
    log:
        "data/logs/energon/{dataset}.log",
    benchmark:
        "data/benchmarks/energon/{dataset}.tsv"
    resources:
        **asks("energon"),
    params:
        settings=settings(layout.Energon),
        sources=spanned("sources"),
    shell:
        "plait energon {params.sources} {output.folder} --settings {params.settings:q} > {log} 2>&1"


rule analyse:
    """Count the tokens of a mixture and weigh its sources."""
    input:
        unpack(inputs(layout.Analysis)),
        unpack(quoted),
    output:
        folder=report(directory(layout.Analysis.PATTERN), **TOKENS_PAGE),
        manifest=layout.pattern(layout.Analysis, layout.MANIFEST),
    log:
        "data/logs/analyse/{mixture}.log",
    benchmark:
        "data/benchmarks/analyse/{mixture}.tsv"
    threads: tokenising
    resources:
        **asks("analyse"),
    params:
        settings=settings(layout.Analysis),
        indexed=spanned("indexed"),
    shell:
        "plait analyse {input.tokenizer} {params.indexed} {output.folder} --workers {threads}"
        " --settings {params.settings:q} > {log} 2>&1"
