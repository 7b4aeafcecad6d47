"""Rollouts of several turns: every move of every game is a response of its own."""

from contextlib import AbstractContextManager
from typing import ClassVar

from opcd.data import Batch, ContextQueryDataModule
from opcd.games.game_lengths import history_tokens
from opcd.games.game_seeds import as_game
from opcd.games.play import Game, play
from opcd.modules.rollouts.base import Rollout
from opcd.modules.rollouts.student_rollout import StudentRollout
from opcd.modules.student import Student
from opcd.modules.teachers.base import Teacher
from opcd.modules.trajectories import Trajectories


class GameRollout(Rollout):
    """Plays the games of a batch to their ends, all at once, and gives a row for every move.

    A row has both views of its turn: the prompt with all that was said so far, and, for the teacher, the same with the
    context of its game. The player is another rollout: StudentRollout is on-policy (the student, without the context),
    TeacherRollout off-policy, MixedRollout draws who makes each move.

    Args:
        rollout: who writes the reply of a turn; StudentRollout if null.
    """

    multi_turn: ClassVar[bool] = True

    def __init__(self, rollout: Rollout | None = None) -> None:
        self.rollout = rollout or StudentRollout()
        if self.rollout.multi_turn:
            raise ValueError("GameRollout wants a rollout that writes one reply, not another GameRollout")
        self.importance_clip = self.rollout.importance_clip

    @property
    def parts(self) -> list[Rollout]:
        """Those that make the moves."""
        return self.rollout.parts

    def max_response_tokens(self, data: ContextQueryDataModule, split: str) -> int:
        """A reply, after the moves that came before it."""
        games = [as_game(example) for example in data.examples(split)]
        added = history_tokens(games, lambda example: len(data.views.student_prompt(example)))
        return added + self.rollout.max_response_tokens(data, split)

    def active(self, student: Student) -> AbstractContextManager[None]:
        """Once for all turns."""
        return self.rollout.active(student)

    def generate(self, student: Student, teacher: Teacher, batch: Batch) -> Trajectories:
        """Play. Rows come turn by turn, and within a turn in the order of the batch."""
        games = [Game(as_game(example)) for example in batch.examples]
        turns: list[Trajectories] = []

        def respond(running: list[Game]) -> list[str]:
            """The next move of each game, kept as a row for both views."""
            rows = [number for number, game in enumerate(games) if game.success is None]
            turn = batch.select(rows).asking([game.question for game in running])
            written = self.rollout.generate(student, teacher, turn)
            turns.append(written)
            return [str(student.tokenizer.decode(ids, skip_special_tokens=True)) for ids in written.responses]

        play(games, respond)
        return Trajectories.joined(turns)
