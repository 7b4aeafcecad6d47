"""A game in one file: three doors, of which the seed opens one. As an overlay, DOORS.yaml:

model: {rollout: {class_path: opcd.games.GameRollout}}
data:
  train:
    class_path: opcd.games.GameSeeds
    init_args: {environment: {class_path: examples.environment.Doors}, start: 0, count: 64}
  val: null

opcd fit --config configs/quickstart.yaml --config DOORS.yaml --data.context LESSONS.txt
"""

from opcd.games import Environment, Step


class Doors(Environment):
    """Name the door that opens.

    Args:
        doors: how many there are.
    """

    def __init__(self, doors: int = 3) -> None:
        self.doors, self.right = doors, 0

    def reset(self, seed: int) -> str:
        """The doors."""
        self.right = seed % self.doors + 1
        return f"Doors: {', '.join(f'[{number}]' for number in range(1, self.doors + 1))}"

    def step(self, action: str | None) -> Step:
        """Open it, or say that it is shut."""
        if action not in {str(number) for number in range(1, self.doors + 1)}:
            return Step("There is no such door.", False, None)
        if action == str(self.right):
            return Step("It opens.", True, True)
        return Step(f"Door {action} is shut.", True, None)
