"""The loop around the step: epochs, evaluation, learning rate, checkpoints, and stopping."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mxnet as mx
import numpy as np

from ..config import Config, share_problems
from ..data import Corpus
from ..data.windows import Epoch, TrainingWindows, Window
from ..distributed.communicator import Communicator
from ..distributed.devices import memory_in_use
from ..errors import DataError, DistributedError, TrainingDiverged
from ..evaluation.static import Evaluation, evaluate
from ..heartbeat import beat
from ..logs import DETAIL, LOGGER, NOTICE, RESULT
from ..memory import Need, explaining_memory_errors, peak_memory
from ..metrics import perplexity
from ..models import LanguageModel
from ..optim.averaging import WeightAverage, has_stalled
from ..prediction import ModelPredictor
from ..progress import Place, TrainingBar
from ..tracking import MetricsFile, TensorBoard, write_status
from .agreement import check_parameters
from .checkpoint import TRAINING_TEXT, Checkpoint, TrainingState, load_parameters, save_checkpoint, set_parameters
from .loss_scale import LossScale
from .run_folder import RunFolder
from .signals import Stopped, StopRequest
from .step import StepResult, TrainingStep

CHECK_EVERY = 100  # steps after which devices and workers compare their parameters


@dataclass
class _Interval:
    """Sums since the last line of the log, and the learning rate of the last step."""

    started: float
    lr: float = 0.0
    loss_sum: float = 0.0
    num_targets: int = 0
    num_steps: int = 0
    grad_norm: float = 0.0

    def add(self, result: StepResult) -> None:
        self.loss_sum += result.loss_sum
        self.num_targets += result.num_targets
        self.num_steps += 1
        if result.was_taken:
            self.grad_norm = result.grad_norm


class Trainer:
    """Trains a model as configured, or until asked to stop, and can be resumed from any checkpoint.

    The learning rate is divided by ``lr_decay`` whenever the validation loss is not a new best. With ``ntasgd`` the
    weights are averaged from the evaluation on at which the validation loss has stalled
    (`gluon_lm.optim.averaging.has_stalled`); with ``asgd`` from the first step on, until it has stalled.

    Parameters
    ----------
    config : Config
    corpus : Corpus
    model : LanguageModel
        Initialised on the communicator's devices.
    communicator : Communicator
    run : RunFolder
        Exists already.
    config_yaml : str
        The resolved configuration, kept with every checkpoint.
    need : Need
        The memory that training takes.

    Raises
    ------
    DataError
        If the training text is shorter than one window for each stream.
    DistributedError
        If the batch cannot be divided evenly among the devices.
    """

    def __init__(
        self,
        config: Config,
        corpus: Corpus,
        model: LanguageModel,
        communicator: Communicator,
        run: RunFolder,
        config_yaml: str,
        need: Need,
    ) -> None:
        self._need = need
        self.config, self.corpus, self.model, self.run = config, corpus, model, run
        self.state = TrainingState(lr=config.optim.lr)
        self._communicator, self._config_yaml = communicator, config_yaml
        problems = share_problems(config, communicator.num_devices)
        if problems:
            raise DistributedError("; ".join(problems))
        self._eos = corpus.vocabulary.eos_id
        self._windows = self._make_windows()
        self._epoch: tuple[int, Epoch] = 0, self._windows.epoch(0)
        self._upcoming: Window | None = None  # the one that was sent in advance
        self._loss_scale = LossScale() if config.training.amp == "float16" else None
        self._step = TrainingStep(model, communicator, config.optim, self._loss_scale)
        self._average: WeightAverage | None = None
        if config.optim.asgd:
            self._start_averaging()
        self._saved_step: int | None = None
        self._has_run = False
        self._trackers: list[MetricsFile | TensorBoard] = []  # rank 0's
        self._agreed_signal = 0

    def _make_windows(self) -> TrainingWindows:
        training, optim, ids = self.config.training, self.config.optim, self.corpus.train
        num_windows = training.batch_size + (optim.shuffle and optim.random_start)
        needed = num_windows * training.bptt
        if len(ids) < needed:
            raise DataError(
                f"{self.corpus.sources['train']}: {len(ids)} training tokens are less than one window for each stream, "
                f"--batch-size {training.batch_size} x --bptt {training.bptt}, {needed} in all; lower these or add text"
            )
        return TrainingWindows(
            ids,
            training.batch_size,
            training.bptt,
            self._eos,
            training.seed,
            max_seq_len_delta=optim.max_seq_len_delta,
            random_start=optim.random_start,
            shuffle=optim.shuffle,
        )

    def _start_averaging(self) -> None:
        self.state.averaging_since = self.state.num_updates
        self._average = WeightAverage(self.model.named_parameters(), self._communicator.devices[0])

    # ---------------------------------------------------------------- the loop

    def fit(self) -> int:
        """Train, then evaluate the best model on the test text.

        This can be done once: the model then holds its best parameters, and the communicator is closed. To continue,
        build another trainer and `restore` the newest checkpoint.

        Returns
        -------
        int
            Exit code: 0 when the run ended by its own rules, 128 + N when signal N stopped it.

        Raises
        ------
        TrainingDiverged
            If a loss or a gradient is not finite; the checkpoints are as they were before the step.
        OutOfMemory
            If there is less memory than training takes.
        RuntimeError
            If it is called a second time.
        """
        if self._has_run:
            raise RuntimeError("this trainer has run; build another one and restore the newest checkpoint to go on")
        self._has_run = True
        self._bar = TrainingBar(self.config.training.epochs, self.config.training.max_steps)
        with StopRequest() as stop:  # to the very end: a launcher ends this process as soon as another one has failed
            try:
                if self._communicator.is_primary:
                    self._open_trackers()
                self._communicator.broadcast_parameters(list(self.model.named_parameters().values()))
                with explaining_memory_errors(self._need):
                    is_whole = self._train_and_test(stop)
                self._note_end("finished" if is_whole else "stopped")
                return 0 if is_whole else stop.exit_code
            except (Exception, KeyboardInterrupt) as error:
                with contextlib.suppress(OSError):  # the error that ended the run is the one to report
                    self._note_end("stopped" if isinstance(error, KeyboardInterrupt) else "failed", str(error))
                raise
            finally:
                self._bar.close()
                for tracker in self._trackers:
                    tracker.close()
                self._communicator.close()

    def _train_and_test(self, stop: StopRequest) -> bool:
        """The work itself; whether it ran to its end by its own rules."""
        longest = self._windows.longest()
        if longest is not None:
            self._step.rehearse(longest)
        self._train(stop)
        self._bar.close()
        # A worker that only waits for the first one may have been asked to stop alone, without all agreeing to it.
        heeded = stop.signal if self._communicator.is_primary or self._agreed_signal else None
        is_whole = heeded is None
        if heeded in (None, signal.SIGINT) and self._communicator.is_primary:
            is_whole &= self._test_best(stop, heeded)
        self._communicator.allgather_object("done")
        return is_whole

    def _open_trackers(self) -> None:
        self._trackers.append(MetricsFile(self.run.metrics, self.state.step, tests_again=self.end is not None))
        if self.config.training.tensorboard:
            self._trackers.append(TensorBoard(self.run.tensorboard, self.state.step, self._config_yaml))
        write_status(self.run.status, "running")

    def _note_end(self, state: str, reason: str | None = None) -> None:
        if self._trackers:
            write_status(self.run.status, state, reason)

    def _record(self, event: str, **values: Any) -> None:
        for tracker in self._trackers:
            tracker.write(event, self.state.step, **values)

    def _train(self, stop: StopRequest) -> None:
        training, state = self.config.training, self.state
        interval = _Interval(time.perf_counter())
        self._counts_from = interval.started - state.seconds
        while True:
            if self._evaluation_due():
                if interval.num_steps:
                    self._log_interval(interval)
                with contextlib.suppress(Stopped):
                    self._validate(stop)
                interval = _Interval(time.perf_counter())
            elif training.checkpoint_every and state.step % training.checkpoint_every == 0:
                self._save_unless_saved()
            if self._must_stop(stop):
                if interval.num_steps:
                    self._log_interval(interval)
                self._save_unless_saved()
                if self._saved_step is None:
                    LOGGER.log(RESULT, "stopped before the first step")
                else:
                    LOGGER.log(RESULT, "stopped at step %d; continue with --resume %s", state.step, self.run.path)
                return
            if self.end is not None:
                LOGGER.info("training ends at step %d: %s", state.step, self.end)
                return
            started, interval.lr = time.perf_counter(), state.lr
            result = self._take_step(stop)
            interval.add(result)
            self._bar.show(self._place(), state.step, state.lr, result, time.perf_counter() - started)
            if state.step % CHECK_EVERY == 0:
                self._check_agreement()
            if state.window % training.log_interval == 0:  # on the same grid after a resume
                self._log_interval(interval)
                interval = _Interval(time.perf_counter())

    def _must_stop(self, stop: StopRequest) -> bool:
        """Whether to stop because of a signal, on which all workers must agree after the same step."""
        if self._communicator.size > 1 and self._agreed_signal:
            stop.take_over(self._agreed_signal)
        return stop.signal is not None and bool(self._agreed_signal or self._communicator.size == 1)

    def _check_agreement(self) -> None:
        check_parameters(self.model.named_parameters().values(), self._communicator, self.state.step)

    def _take_step(self, stop: StopRequest) -> StepResult:
        state, epoch = self.state, self._current_epoch()
        if not epoch.carries_state:
            self._step.states = None
        window = self._upcoming or epoch.window(state.window)
        self._step.set_learning_rate(state.lr * self._windows.relative_size(window))
        beat(state.step)
        self._upcoming = epoch.window(state.window + 1) if state.window + 1 < len(epoch) else None
        result = self._step(
            window,
            self.config.training.seed,
            state.step,
            stop_signal=lambda: stop.signal or 0,
            upcoming=self._upcoming,
        )
        self._agreed_signal = result.stop_signal
        if self._average is not None and result.was_taken:
            self._average.update()
        if self._loss_scale is not None and not result.was_taken:
            state.skipped += 1
            LOGGER.info(
                "step %d: a gradient overflowed float16, and no parameter was changed; the loss is now scaled by %g",
                state.step + 1,
                self._loss_scale.scale,
            )
        state.step += 1
        state.window += 1
        if state.window == len(epoch):
            state.epoch, state.window = state.epoch + 1, 0
            self._step.states = None
            if self._average is None and state.epoch in (self.config.optim.when or ()):
                state.lr /= 10
        if state.step == 1:
            self._record("first_step", loss=result.loss_sum / result.num_targets, time=time.time())
        return result

    def _current_epoch(self) -> Epoch:
        if self._epoch[0] != self.state.epoch:
            self._epoch = self.state.epoch, self._windows.epoch(self.state.epoch)
        return self._epoch[1]

    @property
    def end(self) -> str | None:
        """The rule of the configuration by which the run has ended, in words; None if it goes on."""
        training, optim, state = self.config.training, self.config.optim, self.state
        if state.epoch >= training.epochs:
            return f"--epochs {training.epochs} is reached"
        if training.max_steps is not None and state.step >= training.max_steps:
            return f"--max-steps {training.max_steps} is reached"
        if training.patience is not None and state.evaluations_since_best >= training.patience:
            return f"--patience {training.patience} is reached: so many evaluations gave no new best"
        if optim.asgd and has_stalled(state.valid_losses, optim.nonmono):
            return f"validation loss is above the lowest of those more than {optim.nonmono} evaluations ago (--nonmono)"
        return None

    def _evaluation_due(self) -> bool:
        training, state = self.config.training, self.state
        if state.step == state.evaluated_step:
            return False
        if self.end is not None:
            return True
        return state.step % training.eval_every == 0 if training.eval_every else state.window == 0

    def _validate(self, stop: StopRequest) -> None:
        state, optim = self.state, self.config.optim
        seconds = time.perf_counter() - self._counts_from
        loss = self._validation_loss(stop)
        if not math.isfinite(loss):
            raise TrainingDiverged(
                f"step {state.step}: validation loss {loss:g} must be finite; earlier checkpoints are intact. "
                f"The learning rate is likely too high: lower --lr (now {state.lr:g})"
            )
        state.evaluated_step = state.step
        if state.step:  # the model that a finetuning begins with counts as the best so far, but not for --nonmono
            state.valid_losses.append(loss)
        is_best = state.best_loss is None or loss < state.best_loss
        if is_best:
            state.best_loss, state.best_step, state.evaluations_since_best = loss, state.step, 0
        else:
            state.evaluations_since_best += 1
        LOGGER.info("-" * 89)
        LOGGER.info(
            "| %s | time: %6.2fs | valid loss %5.4f | valid ppl %8.2f%s",
            self._position(),
            seconds,
            loss,
            perplexity(loss),
            " | best" if is_best else "",
        )
        LOGGER.info("-" * 89)
        self._record(
            "valid",
            epoch=state.epoch,
            loss=loss,
            perplexity=perplexity(loss),
            lr=state.lr,
            best=is_best,
            seconds=seconds,
            peak_memory=peak_memory(),
            device_memory=memory_in_use(self._communicator.devices),
        )
        if not is_best and optim.lr_decay is not None:
            state.lr /= optim.lr_decay
        if optim.ntasgd and self._average is None and has_stalled(state.valid_losses, optim.nonmono):
            self._start_averaging()
            LOGGER.info(
                "validation loss is above the lowest of those more than %d evaluations ago: averaging the weights "
                "from step %d on",
                optim.nonmono,
                state.step,
            )
        self._save(is_best=is_best)
        self._counts_from = time.perf_counter()

    def _validation_loss(self, stop: StopRequest) -> float:
        """Rank 0's, on every worker; raises `Stopped` on all if a signal ends the evaluation."""
        loss = None
        if self._communicator.is_primary:
            with contextlib.suppress(Stopped), self._averaged_weights():
                loss = self._evaluate(self.corpus.valid, "validation", stop.check).loss
        loss, stop_signal = self._communicator.broadcast_object([loss, int(stop.signal or 0)])
        self._agreed_signal = max(self._agreed_signal, stop_signal)
        if loss is None:
            raise Stopped
        return loss

    def _averaged_weights(self) -> contextlib.AbstractContextManager[None]:
        """A block in which the model has the weights to evaluate: the averages, if there are any."""
        return contextlib.nullcontext() if self._average is None else self._average.in_place_of_weights()

    def _position(self) -> str:
        state = self.state
        if state.step == 0:
            return "before training"
        if state.window == 0:
            return f"end of epoch {state.epoch:3d}"
        return f"epoch {state.epoch + 1:3d} step {state.step:6d}"

    def _test_best(self, stop: StopRequest, heeded: signal.Signals | None) -> bool:
        """Evaluate the best checkpoint on the test text, or the newest if none was evaluated.

        Parameters
        ----------
        stop : StopRequest
        heeded : signal.Signals or None
            The signal that has ended training.

        Returns
        -------
        bool
            Whether it was read to its end, without a new signal.
        """

        def check() -> None:
            if stop.signal is not heeded:
                raise Stopped

        step = self.state.best_step if self.state.best_step is not None else self._saved_step
        if step is not None:
            load_parameters(self.model, self.run.checkpoint(step))
        try:
            result = self._evaluate(self.corpus.test, "test", check)
        except Stopped:
            LOGGER.log(RESULT, "stopped before the end of the test text; continue with --resume %s", self.run.path)
            return False
        LOGGER.log(RESULT, "=" * 89)
        LOGGER.log(
            RESULT,
            "| %s | model of step %d | test loss %5.4f | test ppl %8.2f",
            "End of training" if heeded is None else "Stopped",
            step or 0,
            result.loss,
            result.perplexity,
        )
        LOGGER.log(RESULT, "=" * 89)
        self._record(
            "test",
            loss=result.loss,
            perplexity=result.perplexity,
            bits_per_word=result.bits_per_word,
            num_tokens=result.num_tokens,
        )
        return True

    def _evaluate(
        self,
        ids: np.ndarray,
        what: str,
        before_window: Callable[[], None] = lambda: None,
    ) -> Evaluation:
        return evaluate(
            self.model,
            ids,
            self._eos,
            self._communicator.devices[0],
            self.config.training.eval_batch_size,
            progress=what,
            before_window=before_window,
        )

    def _place(self) -> Place:
        state, windows = self.state, len(self._epoch[1])
        # At the end of an epoch all its windows are done.
        return Place(state.epoch + 1, state.window, windows) if state.window else Place(state.epoch, windows, windows)

    def _log_interval(self, interval: _Interval) -> None:
        state = self.state
        seconds = time.perf_counter() - interval.started
        loss = interval.loss_sum / interval.num_targets
        epoch, window, windows = self._place()
        LOGGER.log(
            DETAIL,
            "| epoch %3d | %5d/%5d batches | lr %g | ms/batch %5.2f | loss %5.2f | ppl %8.2f | norm %.3f | "
            "%.0f tokens/s",
            epoch,
            window,
            windows,
            interval.lr,
            1000 * seconds / interval.num_steps,
            loss,
            perplexity(loss),
            interval.grad_norm,
            interval.num_targets / seconds,
        )
        scaling = {}
        if self._loss_scale is not None:
            scaling = {"loss_scale": self._loss_scale.scale, "skipped_steps": state.skipped}
            LOGGER.info("| loss scale %g | %d steps skipped so far", *scaling.values())
        self._record(
            "train",
            epoch=epoch,
            loss=loss,
            perplexity=perplexity(loss),
            lr=interval.lr,
            grad_norm=interval.grad_norm,
            tokens_per_second=interval.num_targets / seconds,
            **scaling,
        )

    def predictor(self) -> ModelPredictor:
        """A predictor with the model as it is now; after `fit`, the best one."""
        corpus = self.corpus
        return ModelPredictor(self.model, corpus.vocabulary, corpus.tokenizer, self._communicator.devices[0])

    # ---------------------------------------------------------------- checkpoints

    def _save_unless_saved(self) -> None:
        if self.state.step not in (0, self._saved_step):
            self._save(is_best=False)

    def _save(self, is_best: bool) -> None:
        self._check_agreement()
        carried = self._step.carried_state()
        compression, residuals = self._communicator.compression_state()
        is_evaluated = self.state.evaluated_step == self.state.step
        self.state.seconds = 0.0 if is_evaluated else time.perf_counter() - self._counts_from
        if self._communicator.is_primary:
            self._write_checkpoint(carried, compression, residuals, is_best)
        self._saved_step = self.state.step

    def _write_checkpoint(
        self,
        carried: list[mx.nd.NDArray],
        compression: dict[str, Any],
        residuals: dict[str, mx.nd.NDArray],
        is_best: bool,
    ) -> None:
        weights = {name: p.data(self._communicator.devices[0]) for name, p in self.model.named_parameters().items()}
        averages = self._average.state() if self._average is not None else {}
        checkpoint = Checkpoint(
            parameters=averages or weights,
            unaveraged=weights if averages else {},
            optimizer=self._step.optimizer_state(),
            carried=carried,
            compression=compression,
            residuals=residuals,
            training=self.state,
            corpus=self.corpus.digest,
            text={
                "name": self.corpus.name,
                "licence": self.corpus.licence,
                TRAINING_TEXT: self.corpus.hashes["train"],
            },
            loss_scale={} if self._loss_scale is None else self._loss_scale.state_dict(),
        )
        save_checkpoint(
            self.run,
            checkpoint,
            self._config_yaml,
            self.corpus.vocabulary,
            keep=self.config.training.keep_checkpoints,
            is_best=is_best,
        )

    def start_from(self, checkpoint: Checkpoint, path: Path) -> None:
        """Begin with the model of another run. It is evaluated first, so that a worse one does not become the best.

        Parameters
        ----------
        checkpoint : Checkpoint
        path : Path
            Where it is.

        Raises
        ------
        CheckpointError
            If the checkpoint is of another model.
        """
        set_parameters(self.model, checkpoint.parameters, path)
        self.state.evaluated_step = -1

    def _forget_best_if_gone(self) -> None:
        """An older checkpoint may name a best one that a later best has replaced since."""
        state = self.state
        is_gone = state.best_step is not None and not self.run.checkpoint(state.best_step).is_dir()
        if self._communicator.broadcast_object(is_gone):  # each worker sees its own machine's folder
            LOGGER.log(
                NOTICE,
                "the best checkpoint so far, of step %d, is no longer there: the next evaluation counts as the best",
                state.best_step,
            )
            state.best_loss, state.best_step, state.evaluations_since_best = None, None, 0

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint of the same text, on any number of devices that divides the batch.

        Raises
        ------
        CheckpointError
            If the checkpoint is of another model or optimiser.
        """
        set_parameters(self.model, checkpoint.unaveraged or checkpoint.parameters, self.run.path)
        self._step.load_optimizer_state(checkpoint.optimizer, checkpoint.training.num_updates)
        self._step.restore_carried_state(checkpoint.carried, self.config.training.batch_size, self.run.path)
        self.state = checkpoint.training
        self._forget_best_if_gone()
        if self._loss_scale is not None and checkpoint.loss_scale:
            self._loss_scale.load_state_dict(checkpoint.loss_scale)
        if not (self.config.optim.ntasgd or self.config.optim.asgd):
            self.state.averaging_since = None
        if self.state.averaging_since is not None:
            self._average = WeightAverage(self.model.named_parameters(), self._communicator.devices[0])
            self._average.load(checkpoint.parameters, checkpoint.training.num_updates - self.state.averaging_since)
        self._saved_step = self.state.step
        self._communicator.restore_compression(checkpoint.compression, checkpoint.residuals)
