"""Load published models: convert config and weights of a `transformers` model into a GPT with the same logits.

model = load_original("openai-community/gpt2")
print(generate(model, load_tokenizer("hf:openai-community/gpt2"), "Once upon a time"))
"""

import torch
from torch import Tensor, nn

from config import ModelConfig, did_you_mean
from model import GPT
from modules.registry import build_model
from originals.attention import FAMILIES as ATTENTION_FAMILIES
from originals.attention import Table, require
from originals.delta import FAMILIES as DELTA_FAMILIES
from originals.mamba import FAMILIES as MAMBA_FAMILIES
from originals.recurrent import FAMILIES as RECURRENT_FAMILIES

FAMILIES = ATTENTION_FAMILIES | MAMBA_FAMILIES | RECURRENT_FAMILIES | DELTA_FAMILIES
TEXT_PARTS = {"gemma3": "gemma3_text", "qwen3_5": "qwen3_5_text"}  # families that also read images: the family of their text part
IMAGE_PARTS = ("model.vision_tower.", "model.multi_modal_projector.", "model.visual.")


def load_original(original: str | nn.Module | dict[str, Tensor], family: str | None = None, config=None) -> GPT:
    """Convert a published model into a GPT with the same logits, in float32.

    Training options that their config lacks, such as the balance loss of experts, get our defaults. Of a model that also reads
    images the language model is loaded.

    Parameters
    ----------
    original : str, nn.Module or dict of Tensor
        The name of a model on the Hugging Face hub, or the path of a folder with one; a causal language model of
        `transformers`; or its state dict, together with its config.
    family : str, optional
        A key of FAMILIES; by default the model_type of the config.
    config : optional
        A config of `transformers`, or the dict of its config.json; only for a state dict.

    Returns
    -------
    GPT

    Raises
    ------
    ImportError
        Without `transformers` 5 or later.
    ValueError
        For an unknown family, for options that our model does not have (such as RoPE that depends on the length of the text), for
        quantised weights, and for missing or unknown weights.

    Examples
    --------
    >>> model = load_original("openai-community/gpt2")  # doctest: +SKIP
    """
    library = transformers()
    if isinstance(original, str):
        config = read(library.AutoConfig.from_pretrained, original)
    elif isinstance(original, nn.Module):
        config = original.config
    elif config is None:
        raise ValueError("a state dict alone does not say what model it is of: give its config, too")
    model_type = config.get("model_type") if isinstance(config, dict) else config.model_type
    if None not in (family, model_type) and family != model_type:
        raise ValueError(f"family={family!r}: the config says that it is a {model_type!r}. Leave the family out")
    family = model_type or family
    if family not in FAMILIES | TEXT_PARTS:
        near = did_you_mean(str(family), FAMILIES)
        raise ValueError(f"no family is called {family!r}.{near} There are: {', '.join(FAMILIES)}")
    if isinstance(config, dict):
        config = read(library.AutoConfig.for_model, family, **{name: config[name] for name in config if name != "model_type"})
    is_quantised = getattr(config, "quantization_config", None)
    require(not is_quantised, config, "quantization_config", "dequantise the weights and save them without it")
    if family in TEXT_PARTS:
        family, config = TEXT_PARTS[family], config.text_config
    model_config = convert_config(family, config)  # may raise, before anything large is loaded
    if isinstance(original, str):
        original = read(library.AutoModelForCausalLM.from_pretrained, original, dtype=torch.float32)
    weights = original.state_dict() if isinstance(original, nn.Module) else original
    model = build_model(model_config, config.vocab_size)
    ours = convert(weights, family, config)
    assert ours.keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        if weight.shape != ours[name].shape:
            raise ValueError(
                f"the weight for {name} has the shape {tuple(ours[name].shape)}, but the config makes it {tuple(weight.shape)}: "
                "give the config that belongs to these weights"
            )
    model.load_state_dict(ours)
    return model.eval()


def convert_config(family: str, theirs) -> ModelConfig:
    """Convert a config of transformers. Raises ValueError for what our model does not have."""
    require(theirs.num_hidden_layers > 0, theirs, "num_hidden_layers", "there is at least one")
    require(not getattr(theirs, "is_heterogeneous", False), theirs, "per_layer_config", "layers differ by their kind alone")
    return FAMILIES[family].config(theirs)


def name_table(family: str, theirs) -> Table:
    """The table of a whole model: our weight names to theirs, with transforms."""
    entry = FAMILIES[family]
    table = dict(entry.ends)
    for depth in range(theirs.num_hidden_layers):
        for name, source in entry.layer(theirs, depth).items():
            their_name, *transforms = (source,) if isinstance(source, str) else source
            table[f"layers.{depth}.branches.0.blocks.{name}"] = (f"{entry.layers}.{depth}.{their_name}", *transforms)
    return table


def convert(weights: dict[str, Tensor], family: str, theirs) -> dict[str, Tensor]:
    """Convert their weights to our names and shapes in float32; a tied head is a copy of the embedding.

    Linear but for Gemma's norms, so gradients convert, too. Raises ValueError for missing or unknown names.
    """
    parts = {name.replace("model.language_model.", "model."): w for name, w in weights.items()}
    weights = {name: weight for name, weight in parts.items() if not name.startswith(IMAGE_PARTS)}
    sources = {ours: (source,) if isinstance(source, str) else source for ours, source in name_table(family, theirs).items()}
    head = sources["head.weight"][0]
    if theirs.tie_word_embeddings:
        sources["head.weight"] = sources["embedding.weight"]
        embedding = sources["head.weight"][0]
        if head in weights and embedding in weights and not torch.equal(weights[head], weights[embedding]):
            raise ValueError(f"{head!r} is not {embedding!r}, but the config says tie_word_embeddings: give the right config")
    required = {name for name, *_ in sources.values()}
    unknown = sorted(weights.keys() - required - {head})
    for fault, names in (("lack", sorted(required - weights.keys())), ("hold an unknown", unknown)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"the weights {fault} {names[0]!r}{more}: a {family} with this config holds others")
    converted = {}
    for ours, (name, *transforms) in sources.items():
        weight = weights[name].detach().float()
        for transform in transforms:
            weight = transform(weight)
        converted[ours] = weight.contiguous()
    return converted


def transformers():
    """Import the optional package. Raises ImportError with the cure if it is missing or too old."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError("published models are read by transformers: pip install transformers") from error
    if int(transformers.__version__.split(".")[0]) < 5:
        raise ImportError(f"transformers {transformers.__version__} has other names: pip install --upgrade 'transformers>=5'")
    return transformers


def read(reader, *arguments, **options):
    """Load a config or model by a function of transformers. Raises ValueError with the reason if that fails."""
    try:
        return reader(*arguments, **options)
    except Exception as error:  # a file of others: anything may be wrong in it
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"transformers cannot read {arguments[0]!r}: {reason}") from error
