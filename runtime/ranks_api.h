#ifndef BALLAST_RUNTIME_RANKS_API_H_
#define BALLAST_RUNTIME_RANKS_API_H_

#include <functional>
#include <string>

#include "runtime/frontend.h"
#include "runtime/http_server.h"
#include "runtime/verification.h"

namespace ballast {

// Answers GET /v1/ranks: one object per rank of the job,
//   {"ranks":[{"rank":0,"state":"serves" | "leaving" | "left" | "lost"},..]}
HttpReply AnswerRanks(const Frontend& frontend);

// Answers GET /v1/verify: Verification::Run. 429 beyond Verification::kMostWaiting who wait.
HttpReply AnswerVerify(Verification* verification);

// Answers POST /v1/drain and POST /v1/undrain. The body is {"rank": r}. Both return at once; what
// has come of it is in /v1/ranks.
//
//   drain    `vacate` is to move what only this rank holds elsewhere, and then to have it leave;
//            where that fails again and again it serves on, and the next drain begins anew
//   undrain  the rank serves again, as soon as the others have regrouped with it; one that has not
//            left yet stays
//
// ERRORS 400: the body, with field, value and what is allowed; 409: the rank is not in a state for
//        it. Errors have OpenAI's form.
// THREADS any
HttpReply AnswerDrain(Frontend* frontend, const std::function<void(int rank)>& vacate,
                      const std::string& body);
HttpReply AnswerUndrain(Frontend* frontend, const std::string& body);

}  // namespace ballast

#endif  // BALLAST_RUNTIME_RANKS_API_H_
