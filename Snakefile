"""From raw data to a Hugging Face checkpoint: ask for a file and its stages run.

data/hub/{repo}/{commit}/{file}                          file of the hub or of a URL
data/raw/{dataset}                                       raw source
data/processed/{dataset}/shard_{shard}.jsonl.gz          chat records
data/tokenizers/{tokenizer}                              tokenizer with its added tokens
data/megatron_format/{format}_{dataset}_pack{seq}/shard_{shard}   packed tokens
data/energon/{dataset}                                   webdataset shards for energon
data/analysis/{mixture}                                  token counts, sampling weights
data/models/raw_hf/{model}                               Hugging Face model
data/models/raw/{model}-megatron                         Megatron model
data/models/sharded/{model}-megatron-tp{tp}-pp{pp}       Megatron model, cut for a grid
data/ckpts/{run}/iter_{iteration}                        training checkpoint
data/ckpts/{run}/hf/model_iter_{step}                    trained Hugging Face model
data/verify/.../parity.json                              proof of a model artifact
data/reports/{run}/loss.svg                              loss curve of a run
data/generated/{run}/model_iter_{step}.jsonl             what it answers to the prompts of its run
"""

from snakemake.utils import min_version

from plait import files, layout

min_version("9.0")


report: "workflow/report/workflow.rst"


wildcard_constraints:
    **layout.WILDCARDS,


include: "workflow/common.smk"


# Only `--sdm apptainer` uses it; everything else runs in the environment of Snakemake itself.
container: image("cpu")


include: "workflow/rules/fetch.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/models.smk"
include: "workflow/rules/verify.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/export.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/unmade.smk"


rule all:
    default_target: True
    input:
        [ancient(str(export)) for export in plan.exports()],
        [export.manifest for export in plan.exports()],
        [export.iteration.proof for export in plan.exports()],
        [curve.manifest for curve in plan.curves()],
        [answers.manifest for answers in plan.answers()],
