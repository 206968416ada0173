"""The checks, in the order in which they are made: one file each, and one line here."""

from distft.doctor.checks import (
    clock,
    disk,
    generator,
    gpus,
    host,
    libraries,
    limits,
    link,
    network,
    plugins,
    shared,
    speed,
    torch_build,
    world,
)
from distft.doctor.finding import Check

CHECKS: tuple[Check, ...] = (
    world.CHECK,
    network.CHECK,
    libraries.CHECK,
    plugins.CHECK,
    gpus.CHECK,
    host.CHECK,
    limits.CHECK,
    torch_build.CHECK,
    clock.CHECK,
    shared.CHECK,
    disk.CHECK,
    speed.CHECK,
    link.CHECK,
    generator.CHECK,
)
