"""A LLaVA that has left its reference, and its four gradients written by hand with a second model as the reference."""

import copy

import torch

from tests.tiny_models import IMAGE, llava, llava_batch
from torch_mdgd import MDGDOptimizer, rules, visual_alignment_loss

# A rule by its name and weights: what :func:`rule` makes, and what ``properties.expected`` takes.
FORMS = {
    "published": {},
    "weighted": {"align": 0.3, "regularize": 2.5},
    "unregularized": {"regularize": 0.0},
    "project": {"rule": "Project"},
    "project, weighted": {"rule": "Project", "align": 0.3},
}


def rule(form):
    weights = dict(FORMS[form])
    return getattr(rules, weights.pop("rule", "MDGD"))(**weights)


def counted(module):
    """A list that grows by one whenever the module is run.

    Not by a hook: a frozen part in which one listens is run every time.
    """
    calls, forward = [], module.forward

    def counting(*args, **kwargs):
        calls.append(1)
        return forward(*args, **kwargs)

    module.forward = counting
    return calls


def trainable(model):
    """The projector, the last decoder layer and the head, as published."""
    for name, p in model.named_parameters():
        p.requires_grad_("projector" in name or "layers.1" in name or "lm_head" in name)
        if "vision" in name:
            p.requires_grad_(False)
    return [p for p in model.parameters() if p.requires_grad]


def double_batch(make=llava_batch, **options):
    return {k: x.double() if x.is_floating_point() else x for k, x in make(**options).items()}


def drifted(dropout=0.2, rule=None, **settings):
    """A float64 model in training mode that has left its reference, the reference as a second model, the wrapper."""
    model = llava(dropout).double().train()
    parameters = trainable(model)
    phi = copy.deepcopy(model)
    optimizer = MDGDOptimizer(torch.optim.SGD(parameters, lr=0.1), rule, **settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in parameters:
            p.add_(0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model, phi, optimizer


def by_hand(model, phi, batch, kind="l1"):
    """The four gradients, from two models and autograd.grad, with one state of the random numbers for all passes."""
    state = torch.get_rng_state()

    def run(m):
        torch.set_rng_state(state)
        output = m(**batch, output_hidden_states=True)
        return output.loss, output.hidden_states[-1][batch["input_ids"] == IMAGE]

    roles = []
    for m, other in ((model, phi), (phi, model)):
        parameters = [p for p in m.parameters() if p.requires_grad]
        loss, z = run(m)
        visual = visual_alignment_loss(z, run(other)[1].detach(), kind)
        for scalar in (loss, visual):
            roles.append(torch.autograd.grad(scalar, parameters, retain_graph=True, allow_unused=True))
    torch.set_rng_state(state)
    return roles


def wrap(base, model, rule=None, **settings):
    """With a rule of its own if it is a function of the model."""
    made = rule if rule is None or isinstance(rule, rules.Rule) else rule(model)
    return MDGDOptimizer(base, made, **settings)


def grads(optimizer):
    return [p.grad for p in optimizer.parameters]


def by_hand_task(model, batch):
    state = torch.get_rng_state()
    parameters = [p for p in model.parameters() if p.requires_grad]
    out = torch.autograd.grad(model(**batch).loss, parameters, allow_unused=True)
    torch.set_rng_state(state)
    return out


def add(x, y):
    return y if x is None else x if y is None else x + y
