"""Any nn.Module, trained the same way."""


