"""A run that becomes slower is told so, with the phase; one that is as it was is not."""

from distft.health.slowdown import FEWEST, KEPT, SlowdownDetector

USUAL = {"data": 0.01, "forward": 0.1, "backward": 0.2}


class Clock:
    """Seconds by phase since the run began."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {"eval": 100.0}
        self.step, self.metronome = 0, SlowdownDetector()

    def steps(self, number: int, **times: float):
        for phase, seconds in (USUAL | times).items():
            self.spent[phase] = self.spent.get(phase, 0.0) + number * seconds
        self.step += number
        return self.metronome.look(self.spent, self.step)


def test_slower_steps_are_seen_with_the_phase_that_took_longer() -> None:
    clock = Clock()
    assert clock.steps(3) is None, "compile and warm-up"
    for _ in range(FEWEST):
        assert not clock.steps(50).is_slow(1.5)
    clock.spent["eval"] += 1000
    slow = clock.steps(50, backward=1.2)
    assert slow.is_slow(1.5)
    assert str(slow) == "a step takes 1.31 s and took 0.31 s, backward 1.20 s of it and 0.20 s before"
    assert not clock.steps(50).is_slow(1.5), "one slow look is not the new usual"


def test_a_new_usual_is_not_repeated_for_ever() -> None:
    clock = Clock()
    for _ in range(KEPT):
        clock.steps(1)
    slow = [clock.steps(1, forward=1.0).is_slow(1.5) for _ in range(KEPT)]
    assert slow[0]
    assert not slow[-1]


def test_going_back_to_a_checkpoint_begins_to_count_anew() -> None:
    clock = Clock()
    clock.steps(10)
    clock.step = 4
    assert clock.steps(1) is None
    assert clock.steps(1).step_s > 0


def test_differences_of_milliseconds_are_noise() -> None:
    clock = Clock()
    for _ in range(4):
        clock.steps(1, data=0.0, forward=0.001, backward=0.001)
    assert not clock.steps(1, data=0.0, forward=0.02, backward=0.001).is_slow(1.5)
