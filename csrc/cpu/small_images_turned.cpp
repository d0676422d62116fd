// Its input gradient.
#define FASTRES_FORM SmallImages<true>
#define FASTRES_FORM_EPILOGUES FASTRES_GRADIENT_EPILOGUES
#include "winograd_instantiate.h"
