"""Without mdgd_backward: a model and two losses of one's own, and a capture around each backward pass.

Here two towers are fine-tuned on a label, and the features of the first shall stay what they were.
"""

import torch
from torch import nn

from torch_mdgd import MDGDOptimizer, visual_alignment_loss

torch.manual_seed(0)
pictures, words, labels = torch.randn(32, 8), torch.randn(32, 4), torch.randint(2, (32,))
see, read, head = nn.Linear(8, 16), nn.Linear(4, 16), nn.Linear(16, 2)
parameters = [p for part in (see, read, head) for p in part.parameters()]
optimizer = MDGDOptimizer(torch.optim.AdamW(parameters, lr=1e-2))

for step in range(5):
    with torch.no_grad():
        features = see(pictures)
    with optimizer.reference():  # the parameters are what they were in the beginning
        reference_features = see(pictures)
        task = nn.functional.cross_entropy(head(reference_features + read(words)), labels)
        visual = visual_alignment_loss(reference_features, features)
        with optimizer.capture("visual"):
            visual.backward(retain_graph=True)
        with optimizer.capture("task"):
            task.backward()

    features = see(pictures)
    task = nn.functional.cross_entropy(head(features + read(words)), labels)
    visual = visual_alignment_loss(features, reference_features.detach())
    with optimizer.capture("visual"):
        visual.backward(retain_graph=True)
    with optimizer.capture("task"):
        task.backward()

    optimizer.combine()  # .grad holds d now, to be clipped
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {task:.3f}, visual loss {visual:.4f}")
