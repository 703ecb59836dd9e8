"""Published models in ours: the config and the weights of a `transformers` model, so that ours computes the same.

    model = load_original("openai-community/gpt2")
    print(generate(model, load_tokenizer("hf:openai-community/gpt2"), "Once upon a time"))

originals_families.py says for each family how; originals_mamba.py, originals_recurrent.py and originals_delta.py do so for
those with a recurrence.
"""

import torch
from torch import Tensor, nn

from config import did_you_mean
from model import GPT
from modules.registry import build_model
from originals.attention import FAMILIES as ATTENTION_FAMILIES
from originals.attention import Table
from originals.delta import FAMILIES as DELTA_FAMILIES
from originals.mamba import FAMILIES as MAMBA_FAMILIES
from originals.recurrent import FAMILIES as RECURRENT_FAMILIES

FAMILIES = ATTENTION_FAMILIES | MAMBA_FAMILIES | RECURRENT_FAMILIES | DELTA_FAMILIES


def load_original(original: str | nn.Module | dict[str, Tensor], family: str | None = None, config=None) -> GPT:
    """Our model with the weights of a published one, in float32: it gives the same logits.

    original: the name of a model on the Hugging Face hub or the path of a folder that holds one, both of which
    `transformers` reads; a causal language model of `transformers`; or a state dict of one, together with its config
    (of `transformers`, or the dict that its config.json holds). family: a key of FAMILIES; None is what the config says.
    What is in no config of theirs is ours, such as the cost of uneven routing.

    Raises ImportError where there is no `transformers` of version 5 or later, and ValueError for a family that is not in
    FAMILIES, for a config that asks for what our model does not have (such as RoPE stretched to longer contexts, as in Llama
    3.1, or groups of experts, as in the full DeepSeek-V3), and for names and shapes of weights that do not fit.
    """
    library = transformers()
    if isinstance(original, str):
        config = read("AutoConfig", original)
    elif isinstance(original, nn.Module):
        config = original.config
    elif config is None:
        raise ValueError("a state dict alone does not say what model it is of: give its config, too")
    said = config.get("model_type") if isinstance(config, dict) else config.model_type
    if None not in (family, said) and family != said:
        raise ValueError(f"family={family!r}: the config says that it is a {said!r}. Leave the family out")
    family = said or family
    if family not in FAMILIES:
        near = did_you_mean(str(family), FAMILIES)
        raise ValueError(f"no family is called {family!r}.{near} There are: {', '.join(FAMILIES)}")
    if isinstance(config, dict):
        config = library.AutoConfig.for_model(**config | {"model_type": family})
    model_config = FAMILIES[family].config(config)  # which may refuse it, before anything large is loaded
    if isinstance(original, str):
        original = read("AutoModelForCausalLM", original, dtype=torch.float32)
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


def name_table(family: str, theirs) -> Table:
    """Every weight of ours: where it comes from in a model of that family with that config."""
    known = FAMILIES[family]
    table = dict(known.ends)
    for depth in range(theirs.num_hidden_layers):
        for name, source in known.layer(theirs, depth).items():
            first, *transforms = (source,) if isinstance(source, str) else source
            table[f"layers.{depth}.branches.0.blocks.{name}"] = (f"{known.layers}.{depth}.{first}", *transforms)
    return table


def convert(weights: dict[str, Tensor], family: str, theirs) -> dict[str, Tensor]:
    """Their weights under our names, in our shapes, in float32; a tied head is the embedding once more.

    Raises ValueError for a name that is missing or unknown. It is linear but for Gemma's norms.
    """
    sources = {ours: (source,) if isinstance(source, str) else source for ours, source in name_table(family, theirs).items()}
    head = sources["head.weight"][0]
    if theirs.tie_word_embeddings:
        sources["head.weight"] = sources["embedding.weight"]
        embedding = sources["head.weight"][0]
        if head in weights and embedding in weights and not torch.equal(weights[head], weights[embedding]):
            raise ValueError(f"{head!r} is not {embedding!r}, but the config says tie_word_embeddings: give the right config")
    wanted = {name for name, *_ in sources.values()}
    unknown = sorted(weights.keys() - wanted - {head})
    for fault, names in (("lack", sorted(wanted - weights.keys())), ("hold an unknown", unknown)):
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
    """The package, which is no requirement of ours. Raises ImportError with the cure where it is not there, or is too old."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError("published models are read by transformers: pip install transformers") from error
    if int(transformers.__version__.split(".")[0]) < 5:
        raise ImportError(f"transformers {transformers.__version__} has other names: pip install --upgrade 'transformers>=5'")
    return transformers


def read(kind: str, name: str, **options):
    """What transformers' class of that kind reads under that name. Raises ValueError with the reason where it cannot."""
    auto = getattr(transformers(), kind)
    try:
        return auto.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"transformers cannot read {name!r}: {reason}") from error
