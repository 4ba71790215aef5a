"""How the banks of planted mistakes, and of right answers other than the reference, are written down."""

MISTAKES = []  # (exercise, wrong answer, phrase that its own diagnosis must contain)
RIGHT = []  # (exercise, answer)


def mistake(exercise, phrase):
    def keep(answer):
        MISTAKES.append((exercise, answer, phrase))
        return answer

    return keep


def right(exercise):
    def keep(answer):
        RIGHT.append((exercise, answer))
        return answer

    return keep
