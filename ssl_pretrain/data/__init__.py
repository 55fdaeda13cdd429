"""Images and labels, without torch.

Files (`files`) become pixels (`decode`, in processes: `workers`), pixels a pack (`pack`; made by `building`, unfinished
in `partial`). Labels come from `readers`. Fields drawn for trials: `synthetic`, of `sediment`, with a `pen`.
`sources` says what a word after `--data` means.
"""
