"""A report every few steps of the Trainer, which trains as without it."""

import pytest
import torch
from accelerate import Accelerator
from transformers import Trainer, TrainingArguments

from tests import accelerate_state, tiny_models
from torch_mdgd.integrations.forgetting import ForgettingCallback
from torch_mdgd.report import ForgettingReport


@pytest.fixture(autouse=True)
def fresh_state():
    with accelerate_state.fresh():
        yield


def train(path, model, callback=None, log=False):
    batch = tiny_models.llava_batch()
    samples = [{name: x[i] for name, x in batch.items()} for i in (0, 1)]
    arguments = TrainingArguments(
        output_dir=str(path), max_steps=5, per_device_train_batch_size=1, learning_rate=1e-2, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=samples)
    if callback is not None:
        callback.log = trainer.log if log else None
        trainer.add_callback(callback)
    trainer.train()
    return trainer


@pytest.mark.parametrize("log", [False, True])
def test_a_report_every_other_step(tmp_path, log):
    plain, watched = tiny_models.llava(dropout=0.1), tiny_models.llava(dropout=0.1)
    train(tmp_path, plain)
    report = ForgettingReport(watched, probes=[tiny_models.llava_batch(seed=1)], new_task=[tiny_models.llava_batch()])
    trainer = train(tmp_path, watched, ForgettingCallback(report, every=2), log)
    assert all(map(torch.equal, plain.state_dict().values(), watched.state_dict().values()))
    assert [x.step for x in report.history] == [2, 4, 5]
    logged = [x for x in trainer.state.log_history if "forgetting_probes_kl" in x]
    assert [x["step"] for x in logged] == [2, 4, 5]
    assert all(x["forgetting_probes_drift"] > 0 for x in logged)
    assert [x["step"] for x in trainer.state.log_history if "loss" in x] == [1, 2, 3, 4, 5]
    assert logged[-1]["forgetting_new_task_kl"] == report.history[-1].sets[1].kl
    last = report.history[-1]
    assert [x["step"] for x in last.as_dict()["trace"]] == [2, 4]
    last.save_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "During training" in text
    assert text.count("<svg") == len(last.numbers) + 2 * 2


def test_the_rounding_of_mixed_precision_is_no_drift():
    model = tiny_models.llava()
    report = ForgettingReport(model, probes=[tiny_models.llava_batch()])
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
    patched = vars(model)["forward"]
    found = report.measure(prepared).sets[0]
    assert found.kl == 0
    assert [layer.drift for layer in found.layers] == [0, 0, 0]
    assert vars(model)["forward"] is patched


def test_every_is_checked():
    with pytest.raises(ValueError, match="every must be a whole number of at least 1"):
        ForgettingCallback(None, every=0)
