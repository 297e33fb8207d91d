"""``MDGDModuleMixin``: the passes of MDGD inside the automatic optimization of Lightning."""

from typing import Any

from torch import Tensor, nn

from torch_mdgd.backward import find_optimizer, mdgd_backward
from torch_mdgd.models.tap import Batch
from torch_mdgd.parallel.ranks import Ranks


class MDGDModuleMixin:
    """Put before Lightning's module: ``class Model(MDGDModuleMixin, LightningModule)``.

    Wrap the optimizer in ``configure_optimizers``, and let ``training_step`` return what :meth:`mdgd_backward` does.
    The Trainer's ``accumulate_grad_batches``, ``gradient_clip_val``, ``precision``, schedulers and checkpoints then
    hold as for any module, and clipping sees d.

    With ``strategy="ddp"`` the update is that of one process with all ranks' batches; each rank returns its own loss.
    So it is with ``ModelParallelStrategy(data_parallel_size=n, tensor_parallel_size=1)`` and a ``configure_model`` that
    calls ``fully_shard(..., mesh=self.device_mesh["data_parallel"])`` on the model and its layers.

    Manual optimization needs no mixin: :func:`~torch_mdgd.mdgd_backward` takes what ``self.optimizers()`` returns. In
    several processes it sees the model without what Lightning wraps around it, and asks for one call in
    ``on_train_start``: with ``strategy="ddp"``,
    ``self.optimizers().optimizer.average_over(self.trainer.model.process_group)``.

    Raises:
        TypeError: a class that puts this behind Lightning's module.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        names = [kind.__name__ for kind in cls.__mro__]
        if "LightningModule" in names and names.index("LightningModule") < names.index("MDGDModuleMixin"):
            raise TypeError(
                f"class {cls.__name__}: put MDGDModuleMixin before LightningModule, or that clears the gradients"
            )

    _zeroed = False
    _held_back = False

    def mdgd_backward(self, model: nn.Module, batch: Batch, **options: Any) -> Tensor:
        """All passes over one micro-batch, for ``training_step``; d is in ``.grad`` after the last of a step.

        Args:
            model: called as ``model(**batch)``; its output has a ``loss``.
            batch: inputs and labels.
            **options: ``tap``, ``loss``, ``alignment``, ``separate``, ``diagnose_every`` and ``reuse_vision`` of
                :func:`~torch_mdgd.mdgd_backward`; what is about accumulation and scaling follows the Trainer.

        Returns:
            the task loss, to be returned from ``training_step``: Lightning's own backward pass over it does nothing.

        Raises:
            ValueError: the Trainer runs several processes with another strategy than these, or with tensor parallelism.
            TypeError: ``configure_optimizers`` returned no MDGDOptimizer.
        """
        module: Any = self
        trainer = module.trainer
        ranks = Ranks(trainer.model)
        if trainer.world_size > 1 and ranks.ddp is None:
            _refuse_strategy(trainer.strategy, ranks.sharded)
        optimizer = find_optimizer(module.optimizers())
        if ranks.ddp is not None:
            optimizer.average_over(ranks.group)
            # This is inside its forward pass, after which it would wait for gradients that it is to reduce.
            ranks.ddp.require_backward_grad_sync = False
            self._held_back = True
        if trainer.fit_loop.batch_idx % trainer.accumulate_grad_batches == 0:
            optimizer.zero_grad()
            self._zeroed = True
        loss = mdgd_backward(
            model,
            optimizer,
            batch,
            weight=1 / trainer.accumulate_grad_batches,
            scaler=getattr(trainer.precision_plugin, "scaler", None),
            combine=not trainer.fit_loop._should_accumulate(),
            **options,
        )
        return loss.requires_grad_()

    def backward(self, *args: Any, **kwargs: Any) -> None:
        """Lightning's, after which DistributedDataParallel reduces again."""
        parent: Any = super()
        parent.backward(*args, **kwargs)
        if self._held_back:
            module: Any = self
            module.trainer.model.require_backward_grad_sync = True
            self._held_back = False

    def optimizer_zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Nothing after :meth:`mdgd_backward`: Lightning calls this between ``training_step`` and its backward pass."""
        parent: Any = super()
        if not self._zeroed:
            parent.optimizer_zero_grad(*args, **kwargs)
        self._zeroed = False


def _refuse_strategy(strategy: Any, sharded: bool) -> None:
    """Of several processes without DistributedDataParallel, all but those that ``fully_shard`` alone divides."""
    name = type(strategy).__name__
    if name != "ModelParallelStrategy":
        raise ValueError(
            "MDGDModuleMixin supports several processes with strategy='ddp' or ModelParallelStrategy, not with "
            f"{name}: nobody would average its gradients"
        )
    if strategy.device_mesh["tensor_parallel"].size() > 1:
        raise ValueError(
            "MDGDModuleMixin: ModelParallelStrategy with tensor parallelism, whose processes share a batch, is not "
            "supported: pass data_parallel_size, the number of processes, and tensor_parallel_size=1"
        )
    if not sharded:
        raise ValueError(
            "MDGDModuleMixin: ModelParallelStrategy with a model that is not sharded, so nobody would average its "
            "gradients: call fully_shard in configure_model, or use strategy='ddp'"
        )
