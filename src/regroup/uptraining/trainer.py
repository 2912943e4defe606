"""transformers' Trainer with our loss, our data in one global order, and states that are complete or not there."""

from __future__ import annotations

import contextlib
import inspect
import math
import shutil
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer

from ..data import IGNORED
from ..errors import RegroupError
from ..evaluation import Score, score
from ..processes import barrier, errors_shared, world
from . import states
from .distill import Mix, aligned_targets, hidden_distance, layer_outputs, mixed_loss
from .guard import LossGuard
from .head import Head, Unprojected, separate_head, tapped
from .job import Job, MicroBatches
from .memory import keep_products_alone
from .optimizer import make_optimizer
from .schedule import schedule


class UptrainTrainer(Trainer):
    """Trains the student of a job.

    A step's loss is the mean over all tokens that carry loss in it, whatever processes and micro-batches they lie in.
    """

    def __init__(self, job: Job) -> None:
        recipe, arguments = job.recipe, job.arguments
        self.job = job
        self.mix = Mix(recipe.distill_weight if job.teacher else 0.0, recipe.temperature)
        self.hidden_weight = (recipe.hidden_weight or 0.0) if job.teacher else 0.0
        self.last_loss, self.last_norm = math.nan, None
        self.data_ended = False
        self.learned = 0  # tokens that carried loss, since this process began
        self.seconds_before = 0.0
        adafactor = None
        if recipe.optimizer == "adafactor":
            from transformers.optimization import Adafactor

            # As T5 was trained (Shazeer and Stern 2018, arXiv:1804.04235): the rate is relative to the parameters.
            settings = {"scale_parameter": True, "relative_step": False, "warmup_init": False, "clip_threshold": 1.0}
            adafactor = (Adafactor, {"lr": arguments.learning_rate, **settings})
        super().__init__(
            model=job.student,
            args=arguments,
            eval_dataset=job.held_out or None,  # type: ignore[arg-type]
            optimizer_cls_and_kwargs=adafactor,
        )
        self._head = self._separate_head()
        keep_products_alone(job.student, recipe, job.source.layout)
        # Our loss is divided by the tokens of the whole step; the Trainer must not divide it again.
        self.model_accepts_loss_kwargs = True
        self._step_loss = torch.zeros((), device=arguments.device)
        self._sums = torch.zeros(4, dtype=torch.float64, device=arguments.device)
        self._logged = (time.perf_counter(), 0)
        self.remove_callback(PrinterCallback)
        for callback in self.callback_handler.callbacks:
            if type(callback).__name__ == "TensorBoardCallback":
                callback.logging_dir = str(recipe.output / "logs")  # type: ignore[attr-defined]
        self.guard = LossGuard(recipe.spike_factor, self._observe, lambda began: self._last_state(began))
        self.add_callback(self.guard)
        self._started = time.perf_counter()

    # ---- data and loss ----

    def get_train_dataloader(self) -> Any:
        return MicroBatches(self.job)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The micro-batches of a step, and over how many tokens their loss is a mean, in all processes."""
        batches = list(islice(epoch_iterator, num_batches))
        if not batches:
            self.data_ended = True
            self.control.should_training_stop = self.control.should_save = True
            return [], None
        count = torch.tensor(sum(self.job.objective.count_tokens(batch) for batch in batches), device=device)
        self._step_loss.zero_()
        count = torch.as_tensor(self.accelerator.reduce(count, "sum"))
        self.learned += int(count)
        return batches, count.clamp(min=1)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        model_inputs = {name: value for name, value in inputs.items() if name not in ("labels", "numbers")}
        targets = aligned_targets(inputs["labels"], shifted=self.job.recipe.objective == "causal")
        # Before the student, whose activations are then not in memory at the same time as the teacher's.
        teacher_output = self.job.teacher(model_inputs, targets, inputs["numbers"]) if self.job.teacher else None
        with tapped(self._head) if self._head is not None else contextlib.nullcontext() as tap:
            outputs = model(**model_inputs, **({"output_hidden_states": True} if self.hidden_weight else {}))
        logits: Tensor | Unprojected = outputs.logits
        if self._head is not None and tap is not None and tap.hidden is not None:
            logits = Unprojected(tap.hidden, self._head)
        teacher_logits = teacher_output.logits if teacher_output and self.mix.weight else None
        loss, cross_entropy, kl = mixed_loss(logits, targets, teacher=teacher_logits, mix=self.mix)
        distance = torch.zeros_like(kl)
        if teacher_output and self.hidden_weight:
            distance = hidden_distance(layer_outputs(outputs), teacher_output.hidden, targets)
            loss = loss + self.hidden_weight * distance
        self._sums += torch.stack([cross_entropy, kl, distance, (targets != IGNORED).sum()]).detach()
        loss = loss * (world() / num_items_in_batch)
        extra = getattr(outputs, "aux_loss", None)
        if extra is not None:
            # Of a mixture of experts that was told to return it: a mean over tokens already.
            loss = loss + self._unwrapped.config.router_aux_loss_coef * extra / self.args.gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def _separate_head(self) -> Head | None:
        """What gives the student's logits a chunk at a time; None where only all at once will do.

        A sharded weight is whole within the model's forward alone, a compiled model would be compiled anew, and
        gradients in float16 are scaled before they are small enough to vanish.
        """
        recipe = self.job.recipe
        if recipe.fsdp or recipe.compile or recipe.dtype == "float16":
            return None
        return separate_head(self.job.student, torch.bfloat16 if recipe.dtype == "bfloat16" else None)

    @property
    def _unwrapped(self) -> Any:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self._step_loss += loss
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm: Any = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.last_norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return self.last_norm

    def _observe(self) -> tuple[float, float | None]:
        """Loss of this step and norm of its gradient, over all processes."""
        self.last_loss = float(torch.as_tensor(self.accelerator.reduce(self._step_loss.clone(), "mean")))
        # In float16 the loss scaler is looking for the largest scale that does not overflow.
        norm = None if self.last_norm is None or self.args.fp16 else float(self.last_norm)
        return self.last_loss, norm

    # ---- optimizer, logs, evaluation ----

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        recipe = self.job.recipe
        faster = recipe.attention_rate or 1.0
        if self.optimizer is None and (recipe.optimizer == "muon" or (recipe.optimizer == "adamw" and faster != 1)):
            assert recipe.learning_rate is not None
            student = self.job.student
            self.optimizer = make_optimizer(
                student,
                muon=recipe.optimizer == "muon",
                rate=recipe.learning_rate,
                attention=self.job.converted,
                attention_rate=faster,
                adamw_rate=recipe.adamw_rate,
                betas=recipe.betas,
                weight_decay=recipe.weight_decay or 0.0,
                decayed=self.get_decay_parameter_names(student),
            )
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            recipe = self.job.recipe
            factor = schedule(
                recipe.schedule,
                num_training_steps,
                warmup=recipe.warmup,
                decay=recipe.decay,
                original_steps=recipe.original_steps or 0,
            )
            chosen: Any = optimizer or self.optimizer
            self.lr_scheduler = LambdaLR(chosen, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            sums = torch.as_tensor(self.accelerator.reduce(self._sums.clone(), "sum")).tolist()
            self._sums.zero_()
            tokens = max(1.0, sums[3])
            logs["cross_entropy"] = sums[0] / tokens
            if self.mix.weight:
                logs["kl"] = sums[1] / tokens
            if self.hidden_weight:
                logs["hidden_distance"] = sums[2] / tokens
            now, (then, step) = time.perf_counter(), self._logged
            done = self.state.global_step - (step or self._initial_global_step)
            per_step = self.job.recipe.batch_size * self.job.recipe.window
            logs["tokens_per_second"] = done * per_step / max(now - then, 1e-9)
            self._logged = (now, self.state.global_step)
        # Passes over the data are the stream's to count; the Trainer's number is of steps, and wrong after a break.
        state: Any = self.state
        state.epoch = None
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Held-out loss in nats per token, and the distance from the teacher where it is loaded."""
        model: Any = self.model
        before, training = time.perf_counter(), model.training
        model.eval()
        teacher = self.job.teacher.loaded if self.job.teacher else None
        # FSDP gathers weights into tensors that it uses again, which inference mode would spoil for training.
        with torch.no_grad():
            found: Score = inspect.unwrap(score)(model, self.job.held_out, teacher=teacher)
        model.train(training)
        logs = {"eval_loss": found.nats_per_token, "eval_standard_error": found.standard_error}
        if found.kl_nats_per_token is not None and found.teacher_nats_per_token is not None:
            logs |= {"eval_kl": found.kl_nats_per_token, "eval_teacher_loss": found.teacher_nats_per_token}
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        # Speed is that of training.
        self._logged = (self._logged[0] + time.perf_counter() - before, self._logged[1])
        return logs

    # ---- states ----

    @property
    def seconds(self) -> float:
        """Of training, before breaks too."""
        return self.seconds_before + time.perf_counter() - self._started

    def begin(self) -> None:
        """Start the clock: what came before was preparation."""
        self._started = time.perf_counter()
        self._logged = (self._started, 0)

    def _last_state(self, began: int | None) -> str | None:
        found = states.last_before(self.job.recipe.output, began)
        return None if found is None else str(found)

    def _get_output_dir(self, trial: Any) -> str:
        """Where the Trainer writes ``checkpoint-N``: while it saves, a hidden folder."""
        return self._saving_to or super()._get_output_dir(trial)

    _saving_to: str | None = None

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a state under a hidden name, and give it its own when it is complete.

        Raises:
            RegroupError: the disk is full or fails; states that were saved before are still there.
        """
        recipe, step = self.job.recipe, self.state.global_step
        output = recipe.output
        with errors_shared():
            if self.is_world_process_zero():
                states.staging(output)
        try:
            # FSDP's own saving has the processes wait for each other; one that fails ends, and its launcher ends all.
            with contextlib.nullcontext() if self.is_fsdp_enabled else errors_shared():
                self._saving_to = str(output / ".saving")
                self._write(model, trial)
            with errors_shared():
                if self.is_world_process_zero():
                    self._publish(output, step)
        except RegroupError:
            if self.is_world_process_zero():
                shutil.rmtree(output / ".saving", ignore_errors=True)
            raise
        finally:
            self._saving_to = None
        barrier()

    def _write(self, model: Any, trial: Any) -> None:
        try:
            with states.quiet_files():
                super()._save_checkpoint(model, trial)
        except Exception as error:
            # torch and safetensors say in their own ways that the system did not take what they wrote.
            text = str(error)
            if not isinstance(error, OSError) and "writ" not in text and "os error" not in text:
                raise
            raise self._unsaved(error) from error

    def _publish(self, output: Path, step: int) -> None:
        staged = output / ".saving" / f"checkpoint-{step}"
        try:
            checkpoint = self.job.checkpoint
            for path in checkpoint.companions():
                if path.suffix != ".md" and not (staged / path).exists():
                    (staged / path).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(checkpoint.folder / path, staged / path)
            states.publish(output, step, self._own_state(step))
        except OSError as error:
            raise self._unsaved(error) from error
        spared = states.last_before(output, self.guard.began) if self.guard.began is not None else None
        states.rotate(output, self.job.recipe.keep, spared)

    def _own_state(self, step: int) -> dict[str, Any]:
        examples = step * self.job.recipe.batch_size
        return {
            "format": 1,
            "digest": self.job.digest,
            "step": step,
            "stream": self.job.stream.state_dict(None if self.data_ended else examples),
            "guard": self.guard.state_dict(),
            "seconds": self.seconds,
            "data_ended": self.data_ended,
            "processes": world(),
            "sharded": bool(self.is_fsdp_enabled),
        }

    def _unsaved(self, error: Exception) -> RegroupError:
        last = states.last_before(self.job.recipe.output, None)
        after = f"resume from {last.name}" if last else "start from the beginning: nothing was saved yet"
        return RegroupError(
            "a state of the run could not be saved",
            file=self.job.recipe.output,
            got=(str(error).splitlines() or [type(error).__name__])[0][:200],
            remedy=f"make room on the disk and give the same command again; it will {after}",
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing where the model was built from the state: the Trainer's own way knows no renamed tensors."""
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
