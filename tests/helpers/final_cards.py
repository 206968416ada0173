"""Losses of models that are loaded as their cards say, in a process that does not have this package."""

LOSSES = """
import contextlib, io, json, pathlib, sys
import torch
runs, rows, found = json.loads(sys.argv[1]), [json.loads(line) for line in open(sys.argv[2])], {}
for name, final in runs.items():
    code = pathlib.Path(final, "README.md").read_text().split("```python\\n")[1].partition("\\ninputs = ")[0]
    scope = {}
    with contextlib.redirect_stderr(io.StringIO()):
        exec(code, scope)
    model, tokenizer, loss, count = scope["model"].eval(), scope["tokenizer"], 0.0, 0
    for row in rows:
        alone, ids = tokenizer(row["prompt"])["input_ids"], tokenizer(row["prompt"] + row["completion"])["input_ids"]
        ids = [*ids, tokenizer.eos_token_id]
        start = next((at for at, pair in enumerate(zip(alone, ids)) if len({*pair}) > 1), len(alone))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -len(ids):].float().log_softmax(-1)
        taken = logits[start - 1 : -1].gather(1, torch.tensor(ids[start:])[:, None])
        loss, count = loss - taken.sum().item(), count + len(ids) - start
"""
"""A program's beginning: argv has runs (name -> final/) as JSON and a file of rows. At the end of its loop over the
runs, `loss` is summed over `count` supervised tokens, `model` and `tokenizer` are the card's, `found` is for results.
"""
