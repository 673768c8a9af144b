"""Why a published head loses acceptance."""
