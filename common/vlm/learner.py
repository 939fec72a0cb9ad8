"""A vision-language model as the learner of a run, and the parts it is built of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from common.config.schema import Config, GRPOConfig, RolloutConfig
from common.cost import estimate
from common.counted import counted
from common.data import manifest
from common.data.loading import make_loader
from common.data.task import TaskData
from common.evaluation.evaluate import evenly_spaced
from common.forward import attention
from common.forward.label_scores import LabelScorer
from common.learner import Learner
from common.models import adapters, files, meter, vlm
from common.models.encoder import Encoder
from common.models.extra_embeddings import detached
from common.models.vision import FeatureStore
from common.plugins import check_call, locate
from common.rollout.base import Decoding, Rollout, check_logprobs_match, sampling_mode
from common.run import doctor, loop
from common.run.checkpoint import Checkpoints, read_state
from common.run.recorder import Recorder
from common.runtime.distributed import gather, rank, world
from common.training.base import Epochs, Trainer, total_updates
from common.training.grpo.trainer import GRPOTrainer
from common.training.reward_mix import bind_rewards, prepare_rewards
from common.training.sft import SFTTrainer
from common.types import Answers, Task, UserError
from common.vlm import check, prompting
from common.vlm.prompting import TaskPrompts, Words
from common.vlm.replies import Replies, greedy

# The parts of a vision-language learner, from the configuration: rollout options, encoder, embeddings, checks.


def backend_options(config: Config, asked: TaskPrompts) -> dict[str, Any]:
    """Arguments of the rollout backend: those of the configuration; a backend that must know the longest prompt
    (`prompt_tokens`) and was told no limit gets room for the run's prompts. All ranks call it together.
    """
    options = config.rollout.options
    if options.get("prompt_tokens", 0) is not None:
        return options
    longest, context = 0, None
    if rank() == 0:
        measure, size = check.check_weights(config), config.model.image_size
        prompts = [prompt for part in (asked.train, *asked.evaluation.values()) for prompt in part]
        longest, context = max(measure.tokens(prompts, size), default=0), measure.context
    longest, context = gather((longest, context))[0]
    return {**options, "prompt_tokens": meter.room(longest, config.rollout.max_completion_tokens, context)}


def check_logprobs(config: Config, backend: object) -> None:
    """See `check_logprobs_match`; before the weights are loaded `backend` is a class, then its object."""
    if isinstance(config.trainer, GRPOConfig):
        if config.rollout.overlap and not getattr(backend, "has_weight_copy", False):
            raise UserError(
                "rollout.overlap=true needs a sampler with weights of its own, but this one samples with the policy"
                " that is being updated; use rollout=vllm, or rollout.overlap=false"
            )
        check_logprobs_match(backend, sampling(config.rollout), config.trainer.importance_correction)


def shared_hash(folder: Path) -> str:
    """`files.weights_hash`, by one rank for all: it reads every weight. All ranks call it together."""
    return gather(files.weights_hash(folder) if rank() == 0 else "")[0]


def make_encoder(config: Config, policy: vlm.VLM, sha256: str, task: Task) -> Encoder:
    """Prompts to tensors; with a store of image features if the vision tower is frozen and disk space is given.

    `sha256`: of the weights; features of different ones are kept apart.
    """
    store = None
    if config.model.feature_cache_gb > 0:
        folder = Path(config.cache_dir).resolve() / "features" / weights_name(config, sha256)
        store = FeatureStore(folder, int(config.model.feature_cache_gb * 2**30))
    return Encoder(policy, make_loader(config, task), config.model.max_prompt_tokens, store)


def weights_name(config: Config, sha256: str) -> str:
    """Names the weights that a run begins from as they compute, for caches: their hash and their number format."""
    number_format = "int8" if config.model.load_in_8bit else config.model.dtype
    return f"{sha256[:16]}-{number_format}"


def sampling(config: RolloutConfig) -> Decoding:
    """How completions are drawn for training."""
    return Decoding(config.temperature, config.top_k, config.top_p, config.max_completion_tokens)


# A vision-language model as the learner of a run.
#
# It answers in words (common/vlm/replies.py), is trained by GRPO or SFT (common/training/), and samples by the backend
# that `rollout.backend` names. A method that needs more than prompts (ALERT: a draft, pictures seen beforehand,
# embeddings behind the vocabulary) derives from it and overrides the steps in which it differs.


class VLMLearner(Learner):
    """See `Learner` in common/learner.py."""

    def __init__(
        self, config: Config, data: TaskData, device: torch.device, folder: Path, checkpoints: Checkpoints
    ) -> None:
        """See `Learner` in common/learner.py.

        Raises:
            UserError: The weights do not load, have changed since the run began, or the doctor refuses the training.
        """
        self.config, self.data, self.task, self.device = config, data, data.task, device
        self.folder, self.checkpoints = folder, checkpoints
        self.prompting = prompting.of_config(config)
        self.prompts = prompting.ask(self.prompting, self.task)
        manifest.check_sources(folder, self.sources())
        self.updates = total_updates(config.trainer, len(self.task.train.items))
        self.trainer: Trainer | None = None

        # what can be refused before weights are loaded
        options = backend_options(config, self.prompts)
        check_call(config.rollout.backend, "rollout.backend", options, given=1)
        backend = locate(config.rollout.backend, "rollout.backend")
        check_logprobs(config, backend)
        state = checkpoints.state
        learns = isinstance(config.trainer, GRPOConfig) and self.updates > (0 if state is None else state.update)
        self.rewards = prepare_rewards(config.rewards) if learns else {}
        self.prepare()

        # the model, with fresh adapters that are alike on all ranks
        source = files.weights_folder(config)
        torch.manual_seed(config.seed)
        self.policy = vlm.load(source, config.model, device, train=config.trainer.name != "none")
        attention.install(self.policy.model, config.model.attention)
        self.weights = {"path": str(source), "sha256": shared_hash(source)}
        checkpoints.begin_from(self.weights["sha256"], self.weights["path"])
        # rewards take the model before anything is attached or trained, and before a training is continued
        name = weights_name(config, self.weights["sha256"])
        bind_rewards(self.rewards, self.policy, config.rollout.evaluation_batch, name)

        # the prompts that will really be asked: from here on they do not change
        self.setup()
        assert self.prompts.prompting.final, "setup makes the prompts final"
        if config.doctor is not True:  # which leaves nothing behind
            manifest.freeze_prompts(folder, self.prompts.hashes(), self.sources())

        self.encoder = make_encoder(config, self.policy, self.weights["sha256"], self.task)
        self.rollout: Rollout = backend(self.policy, **options)
        check_logprobs(config, self.rollout)  # again: it may say so of an object alone
        self.replies = Replies(
            self.encoder,
            LabelScorer(self.policy) if config.label_scoring else None,
            reasoned=config.label_scoring != "direct",
            max_tokens=config.rollout.max_completion_tokens,
            batch=config.rollout.evaluation_batch,
            articles=config.protocol.articles,
        )
        long = state is None and config.doctor == "auto" and doctor.is_long(self.updates, config.trainer)
        if config.doctor is True or long:
            self.examine()

    def prepare(self) -> None:
        """Make what is needed before the model is loaded. All ranks call it together."""

    def setup(self) -> None:
        """Give the loaded model what the method puts beside it, and make `prompts` final. All ranks call it
        together.
        """

    def sources(self) -> dict[str, str]:
        """A hash of everything beside the data that decides what is asked, by what it is called."""
        return self.prompting.sources(self.task)

    @property
    def decoding(self) -> str:
        return str(greedy(self.config.rollout.max_completion_tokens))

    def predict(self, split: str, limit: int | None = None) -> Answers:
        prompts = evenly_spaced(self.prompts.evaluation[split], limit)
        with self._sampling():
            return self.replies(self.rollout, self.prompts, split, prompts, scored=limit is None)

    def diagnostics(self, split: str, answers: Answers) -> dict[str, Any]:
        return self.prompting.diagnostics(self.task, split, answers)

    def set_task(self, task: Task) -> None:
        old, self.task = self.task, task
        asked = {  # a split that is the same is not asked anew
            split: self.prompts.evaluation[split]
            if old.evaluation.get(split) is each
            else self.prompting.evaluation_prompts(task, split)
            for split, each in task.evaluation.items()
        }
        self.prompts = replace(self.prompts, task=task, evaluation=asked)
        self.encoder.set_images(make_loader(self.config, task))

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
            if rank() == 0:
                self.save_weights(folder)

    def save_weights(self, folder: Path) -> None:
        """Write a folder that `from_pretrained` loads: model (or adapters) and processor. Rank 0 calls it."""
        policy = self.policy
        with detached(policy.model):
            policy.model.save_pretrained(folder)
        if policy.hub is not None and hasattr(policy.model, "disable_adapter"):
            adapters.name_base(folder, *policy.hub)
        policy.processor.save_pretrained(folder)

    @classmethod
    def into_vocabulary(cls, config: Config, policy: vlm.VLM, folder: Path) -> Words | None:
        """Make words of the vocabulary of what a run has trained beside the weights, for readers that know nothing of
        the method.

        Args:
            config: The run's configuration.
            policy: The trained model without adapters, and its processor; both are changed.
            folder: What `save` wrote.

        Returns:
            The words; None: the weights are all that was trained.
        """
        return None

    @classmethod
    def kept_files(cls, config: Config, folder: Path) -> tuple[str, ...] | None:
        """Which files of `folder`, beside the weights, an exported model needs to be asked by this class again; None:
        it cannot be, without the pictures that it was trained on.
        """
        return ()

    def close(self) -> None:
        if self.trainer is not None:
            self.trainer.close()
        self.rollout.close()

    def examine(self) -> None:
        """Let the doctor (common/run/doctor.py) show its findings as a table.

        Raises:
            UserError: One is a reason not to train; names the finding and the fix.
        """
        config = self.config
        assert isinstance(config.trainer, GRPOConfig)
        with self._sampling():
            findings = doctor.examine(
                vlm=self.policy,
                encoder=self.encoder,
                rollout=self.rollout,
                prompts=self.prompts.train,
                rewards=self.rewards,
                decoding=sampling(config.rollout),
                config=config.trainer,
                image_size=config.model.image_size,
                updates=self.updates,
                ranks=world(),
                cost=estimate.of_run(config, self.prompts, Path(self.weights["path"]), world()),
                seed=config.seed,
                open_image=self.task.images.open,
            )
        if rank() == 0:
            Console().print(doctor.report(findings))
        doctor.refuse(findings)

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        """See `Trainer.sampling`; before there is a trainer, the weights are those that were loaded."""
        if self.policy.extra_embeddings is not None:
            self.policy.extra_embeddings.flush()
        with sampling_mode(self.rollout, 0) if self.trainer is None else self.trainer.sampling():
            yield

    def make_trainer(self) -> Trainer:
        """The trainer, which begins where an earlier attempt of the run stopped."""
        config, resumed = self.config, self.checkpoints.resumed
        shared: dict[str, Any] = {
            "vlm": self.policy,
            "encoder": self.encoder,
            "rollout": self.rollout,
            "prompts": Epochs(partial(self.prompting.train_prompts, self.task), self.prompts.train),
            "config": config.trainer,
            "deepspeed": config.deepspeed,
            "updates": self.updates,
            "seed": config.seed,
            "resume": None if resumed is None else resumed / "deepspeed",
            "done": 0 if self.checkpoints.state is None else self.checkpoints.state.update,
        }
        if isinstance(config.trainer, GRPOConfig):
            return GRPOTrainer(
                **shared,
                rewards=self.rewards,
                decoding=sampling(config.rollout),
                overlap=config.rollout.overlap,
                open_image=self.task.images.open,
            )
        return SFTTrainer(**shared, loss=config.protocol.sft_loss, reply=self.prompting.label_response)

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
        """Write a checkpoint of the model: to resume from, and to load elsewhere."""
        assert self.trainer is not None
        self.trainer.save(folder / "deepspeed")
        self.save(folder / "model")
