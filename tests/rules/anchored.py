"""Models whose layers are anchored, and the float64 form of the pull: W₀, C and D at full size."""

import copy

import torch
from peft import LoraConfig, get_peft_model

from tests.tiny_models import IMAGE, llava, llava_batch
from torch_mdgd import connector, freeze_all_but, last_decoder_layers

LORA = LoraConfig(
    r=2, lora_alpha=4, target_modules=r".*language_model.*(q_proj|k_proj|up_proj|down_proj)|.*projector.*linear.*"
)


def batch(seed=0, labels=True):
    found = llava_batch(seed=seed)
    found["pixel_values"] = found["pixel_values"].double()
    return found if labels else {name: x for name, x in found.items() if name != "labels"}


def full():
    """The connector, with biases, and the last layer, without."""
    model = llava().double().train()
    return model, freeze_all_but(model, [connector(model), *last_decoder_layers(model, 1)])


def adapted(config=LORA):
    torch.manual_seed(0)
    model = get_peft_model(llava().requires_grad_(False), copy.deepcopy(config)).double().train()
    return model, [p for p in model.parameters() if p.requires_grad]


def move(parameters, scale=0.1, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.add_(scale * torch.randn(p.shape, generator=generator, dtype=p.dtype))


def inputs_and_answers(model, name, batches, tokens="prompt"):
    """What enters a layer and what it makes of it: at the marked tokens of the decoder, at all in a connector."""
    seen = []
    module = dict(model.named_modules())[name]
    handle = module.register_forward_hook(lambda m, args, out: seen.append((args[0].detach(), out.detach())))
    xs, ys = [], []
    for one in batches:
        seen.clear()
        with torch.no_grad():
            model(**one)
        (x, y), ids = seen[0], one["input_ids"]
        keep = torch.ones(x.shape[:-1], dtype=torch.bool)
        if "language_model" in name:
            attended = one["attention_mask"].bool()
            prompt = attended & (one["labels"] == -100) if "labels" in one else attended
            keep = {"prompt": prompt, "all": attended, "image": ids == IMAGE}[tokens]
        xs.append(x[keep])
        ys.append(y[keep])
    handle.remove()
    return torch.cat(xs), torch.cat(ys)


def covariance(x, y, bias, rank, relative=True):
    """C, of the whole second moment, or of its top eigenvectors and an isotropic rest."""
    if bias:
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
    C = x.T @ x / len(x)
    size = y.square().sum(1).mean() if relative else C.diagonal().mean()
    if rank is not None and rank < len(C):
        values, vectors = torch.linalg.eigh(C)
        rest = values[:-rank].mean()
        C = (vectors * torch.cat([rest.expand(len(C) - rank), values[-rank:]])) @ vectors.T
    return C / size
