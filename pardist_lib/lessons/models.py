"""The small networks of the first lessons."""

from torch import nn
from torch.nn import functional as F


class ArticleNet(nn.Module):
    """The article's network: 10 → hidden → 10 with ReLU; 430 parameters at its 20. x: (b, 10) -> (b, 10)"""

    def __init__(self, dtype=None, hidden=20):
        super().__init__()
        self.fc1 = nn.Linear(10, hidden, dtype=dtype)
        self.fc2 = nn.Linear(hidden, 10, dtype=dtype)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x)))  # (b, 10) -> (b, hidden) -> (b, 10)


class DigitsMLP(nn.Module):
    """Digits to scores: 64 → hidden → 10 with ReLU; 4,810 parameters at hidden 64. x: (b, 64) -> (b, 10)"""

    def __init__(self, hidden=64, dtype=None):
        super().__init__()
        self.fc1 = nn.Linear(64, hidden, dtype=dtype)
        self.fc2 = nn.Linear(hidden, 10, dtype=dtype)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x)))  # (b, 64) -> (b, hidden) -> (b, 10)
