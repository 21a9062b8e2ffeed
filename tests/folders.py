"""Small tokenizer folders, made by hand: bytes, and the special tokens asked for; sizes of a tiny model."""

from plait import files

VISION = ("<vision>", "<vpatch>", "<vrow_sep>", "<vframe_sep>", "</vision>")
SIZES = {
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}
"""A tiny random model, as `raw_hf` of the config has it."""

IMAGE = ("<image>", "<pad>")
CHATML = ("<|im_start|>", "<|im_end|>")


def tokenizer_folder(folder, *, vision=False, chatml=False, image=False, more=0):
    """A byte-level tokenizer of 259 tokens plus those asked for, with its manifest."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: number for number, name in enumerate(["<unk>", "<s>", "</s>", *letters])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    groups = ((VISION, vision), (CHATML, chatml), (IMAGE, image))
    names = [
        *(n for group, wanted in groups if wanted for n in group),
        *(f"<extra_{n}>" for n in range(more)),
    ]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    if image:
        tokenizer.pad_token = "<pad>"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    ids = tokenizer.get_vocab()
    facts = {
        "vocab_size": len(tokenizer),
        "bos_id": 1,
        "eos_id": 2,
        "vision": {name: ids[name] for name in VISION if name in ids},
        "chatml": {name: ids[name] for name in CHATML if name in ids},
        "image_token_id": ids.get("<image>"),
        "pad_token_id": ids.get("<pad>"),
    }
    files.write_manifest(folder, kind="tokenizer", settings={}, facts=facts)
    return folder
