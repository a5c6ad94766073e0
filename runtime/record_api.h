#ifndef BALLAST_RUNTIME_RECORD_API_H_
#define BALLAST_RUNTIME_RECORD_API_H_

#include <string>

#include "monitor/trace_recorder.h"
#include "runtime/http_server.h"

namespace ballast {

// Answers POST /v1/record/<action>.
//
//   start  {"what": "counts" | "ids", "max_bytes": n}, each optional; starts and gives the state
//   stop   stops and gives the state
//   status gives the state: {"recording":true,"full":false,"gap":false,"what":"counts","steps":n,
//          "tokens":n,"bytes":n,"max_bytes":n}; of ids without "steps"
//   dump   the .npy file of what has been recorded so far
//
// ERRORS 400: the body, with field, value and what is allowed; 409: not in this state, with what
//        to do first. Errors have OpenAI's form.
// THREADS any
HttpReply AnswerRecord(TraceRecorder* recorder, const std::string& action, const std::string& body);

}  // namespace ballast

#endif  // BALLAST_RUNTIME_RECORD_API_H_
