"""Remedies of the rules that have several, by what exactly is wrong."""

CONVERT = "convert it with syncbn.convert_sync_batchnorm (bn.sync=true)"
CALL = (
    "call syncbn.sync_batch_norm in the place of F.batch_norm, or use a layer, which syncbn.convert_sync_batchnorm"
    " finds"
)
GROUP = "let it sum over all ranks (bn.group=world), unless groups are meant"
GATHER = (
    "let it see the samples of all ranks (torch.distributed.nn.functional.all_gather), or compare within a fixed number"
    " of samples"
)
FEED = "average or gather over the ranks what feeds the state, before it does"
COUNT = (
    "return the sum and the count, multiply the sum by the world size and divide it by the count over all ranks"
    " (docs/own-loop.md)"
)
SCALE = "multiply it by the world size, or divide it by the count over all ranks (docs/own-loop.md)"
