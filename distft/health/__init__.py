"""Watches over a running job: every rank writes heartbeats; hangs, stragglers and slowdowns are named from them."""
