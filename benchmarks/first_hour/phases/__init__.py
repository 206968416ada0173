"""The phases in their order: what comes first is worth most when the machine is taken away."""

from benchmarks.first_hour.phase import Phase
from benchmarks.first_hour.phases import doctor, goal, memory, oom, paging, parity, ranks, rates, resume, suite

PHASES: dict[str, Phase] = {
    phase.name: phase
    for phase in (
        doctor.PHASE,
        rates.PHASE,
        suite.PHASE,
        parity.PHASE,
        memory.PHASE,
        goal.PHASE,
        paging.PHASE,
        resume.PHASE,
        oom.PHASE,
        ranks.PHASE,
    )
}
