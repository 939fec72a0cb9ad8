"""A vision-language model as the learner of a run.

It answers in words (common/evaluation/replies.py), is trained by GRPO or SFT (common/training/), and samples by the
backend that `rollout.backend` names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from common.config.schema import Config, GRPOConfig, RolloutConfig
from common.cost import estimate
from common.counted import counted
from common.data.task import Questions
from common.evaluation import evaluate
from common.evaluation.replies import Replies, greedy
from common.forward.label_scores import LabelScorer
from common.method import Looks
from common.models import adapters, vlm
from common.models.encoder import Encoder
from common.models.slots import detached
from common.rewards import Reward
from common.rollout.base import Decoding, Rollout, awake
from common.run import doctor, loop
from common.run.checkpoint import Checkpoints, read_state
from common.run.recorder import Recorder
from common.runtime.distributed import rank, world
from common.training.base import Trainer
from common.training.grpo.trainer import GRPOTrainer
from common.training.schedule import Epochs, total_updates
from common.training.sft import SFTTrainer
from common.types import Answers, UserError

EMBEDDINGS = "embeddings"  # beside the weights


class VLMLearner:
    """See `Learner` in common/learner.py."""

    remarks = ()

    def __init__(
        self,
        config: Config,
        questions: Questions,
        policy: vlm.VLM,
        encoder: Encoder,
        rollout: Rollout,
        rewards: dict[str, Reward],
        weights: dict[str, str],
        checkpoints: Checkpoints,
    ) -> None:
        """
        Args:
            config: Of the run.
            questions: Images, labels and prompts.
            policy: The model.
            encoder: Prompts to tensors.
            rollout: Samples with the model's weights.
            rewards: The reward mix, the same for the doctor and for the training.
            weights: Path and sha256 of what the model was loaded from.
            checkpoints: Of the run.
        """
        self.config, self.questions, self.policy, self.encoder = config, questions, policy, encoder
        self.rollout, self.rewards, self.weights, self.checkpoints = rollout, rewards, weights, checkpoints
        self.updates = total_updates(config.trainer, len(questions.train))
        self.trainer: Trainer | None = None
        labels = LabelScorer(policy) if config.label_scoring else None
        self.replies = Replies(
            encoder,
            labels,
            reasoned=config.label_scoring != "direct",
            max_tokens=config.rollout.max_completion_tokens,
            batch=config.rollout.evaluation_batch,
            articles=config.protocol.articles,
        )

    @property
    def decoding(self) -> str:
        return str(greedy(self.config.rollout.max_completion_tokens))

    def predict(self, split: str, limit: int | None = None) -> Answers:
        prompts = evaluate.spread(self.questions.evaluation[split], limit)
        with self._sampling():
            return self.replies(self.rollout, self.questions, split, prompts, scored=limit is None)

    def ask(self, questions: Questions) -> None:
        """See `Asks`."""
        self.questions = questions
        self.encoder.forget()

    def train(self, recorder: Recorder) -> int:
        if self.updates:
            self.trainer = self.make_trainer()
            made = loop.train(self, self.trainer, self.updates, self.config, self.checkpoints, recorder, self._save_all)
            if self.config.evaluate == "best":
                self._restore_best(made)
            return made
        return 0

    def save(self, folder: Path) -> None:
        with self._sampling():
            self._save_weights(folder)

    def close(self) -> None:
        if self.trainer is not None:
            self.trainer.close()
        self.rollout.close()

    def examine(self) -> None:
        """The doctor (common/run/doctor.py): its findings as a table, and an error if one is a reason not to train.

        Raises:
            UserError: Names the finding and the fix.
        """
        config = self.config
        assert isinstance(config.trainer, GRPOConfig)
        with self._sampling():
            findings = doctor.examine(
                vlm=self.policy,
                encoder=self.encoder,
                rollout=self.rollout,
                prompts=self.questions.train,
                rewards=self.rewards,
                decoding=sampling(config.rollout),
                config=config.trainer,
                image_size=config.model.image_size,
                updates=self.updates,
                ranks=world(),
                cost=estimate.of_run(config, self.questions, Path(self.weights["path"]), world()),
                seed=config.seed,
            )
        if rank() == 0:
            Console().print(doctor.report(findings))
        doctor.refuse(findings)

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        """See `Trainer.sampling`; before there is a trainer, the weights are those that were loaded."""
        if self.policy.slots is not None:
            self.policy.slots.settle()
        with awake(self.rollout, 0) if self.trainer is None else self.trainer.sampling():
            yield

    def make_trainer(self) -> Trainer:
        """What `train` steps; it begins where an earlier attempt of the run stopped."""
        config, questions, resumed = self.config, self.questions, self.checkpoints.resumed
        shared: dict[str, Any] = {
            "vlm": self.policy,
            "encoder": self.encoder,
            "rollout": self.rollout,
            "prompts": Epochs(partial(questions.method.train_prompts, questions.task), questions.train),
            "config": config.trainer,
            "deepspeed": config.deepspeed,
            "updates": self.updates,
            "seed": config.seed,
            "resume": None if resumed is None else resumed / "deepspeed",
            "done": 0 if self.checkpoints.state is None else self.checkpoints.state.update,
        }
        if isinstance(config.trainer, GRPOConfig):
            return GRPOTrainer(
                **shared, rewards=self.rewards, decoding=sampling(config.rollout), overlap=config.rollout.overlap
            )
        return SFTTrainer(**shared, loss=config.protocol.sft_loss, reply=questions.method.label_response)

    def _restore_best(self, made: int) -> None:
        """Take over the weights of the best evaluation among the updates that were made.

        Raises:
            UserError: They were written by another number of ranks, whose optimizer state cannot be read here.
        """
        assert self.trainer is not None
        best = self.checkpoints.best()
        if best is None or read_state(best).update == made:
            return
        if read_state(best).ranks != world():
            raise UserError(
                f"evaluate=best: {best.name} was written by {counted(read_state(best).ranks, 'rank')}, not {world()};"
                " continue on"
                f" as many, or test it by itself: model.path={best / 'model'} trainer=none under another run_name"
            )
        self.trainer.restore(best / "deepspeed", read_state(best).update)

    def _save_all(self, folder: Path) -> None:
        """What a checkpoint holds of the model: to resume from, and to load elsewhere."""
        assert self.trainer is not None
        self.trainer.save(folder / "deepspeed")
        self.save(folder / "model")

    def _save_weights(self, folder: Path) -> None:
        """A folder that `from_pretrained` loads: model (or adapter) and processor; embeddings beside them."""
        if rank() != 0:
            return
        policy, questions = self.policy, self.questions
        with detached(policy.model):
            policy.model.save_pretrained(folder)
        if policy.hub is not None and hasattr(policy.model, "disable_adapter"):
            adapters.name_base(folder, *policy.hub)
        policy.processor.save_pretrained(folder)
        if policy.slots is not None and isinstance(questions.method, Looks):
            questions.method.export(folder / EMBEDDINGS, policy.slots.table().cpu(), questions.task)


def sampling(config: RolloutConfig) -> Decoding:
    """How completions are drawn for training."""
    return Decoding(config.temperature, config.top_k, config.top_p, config.max_completion_tokens)
